//! Arrange: from the whole tensors of the source, through the logical tensors of the published
//! checkpoint, to the tensors of the view; and what is missing on the way.

mod assemble;
mod complete;
mod detect;
mod group;

use std::collections::BTreeMap;

use super::{Fragment, MatrixId};
use crate::tensor::{BoxMap, DType};

pub(super) use assemble::{from_layout, from_published, to_layout, to_published};
pub(super) use complete::Completeness;
pub(super) use detect::source_layout;

/// A tensor of the published checkpoint: its shape, and which boxes of source matrices it consists
/// of. It need not exist as stored bytes.
#[derive(Debug)]
pub(super) struct LogicalTensor {
    pub shape: Vec<u64>,
    /// Target: the logical tensor. Source: the matrix.
    pub parts: Vec<(MatrixId, BoxMap)>,
}

/// A tensor of the view, before its dtype and body are chosen.
#[derive(Debug)]
pub(super) struct ViewTensor {
    pub name: String,
    pub shape: Vec<u64>,
    pub fragments: Vec<Fragment>,
    /// Whether it holds expert weights, which always have the output dtype.
    pub grouped: bool,
    /// Whether its first axis counts experts.
    pub expert_axis: bool,
    /// The dtype in published checkpoints, where the mapping gives it and the source is not one.
    pub dtype: Option<DType>,
}

/// Numbers of tensors that `drop` rules left out, by reason.
pub(super) type DroppedCounts = BTreeMap<String, u64>;

/// The logical tensors of the checkpoint, by published name.
pub(super) type LogicalTensors = BTreeMap<String, LogicalTensor>;
