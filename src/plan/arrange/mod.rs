//! From matrices to the tensors of the view.

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

/// A tensor of the checkpoint's own naming, wherever its elements are.
#[derive(Debug)]
pub(super) struct LogicalTensor {
    pub shape: Vec<u64>,
    /// Target: the logical tensor. Source: the matrix.
    pub parts: Vec<(MatrixId, BoxMap)>,
}

/// A tensor of the view before its dtype is known.
#[derive(Debug)]
pub(super) struct ViewTensor {
    pub name: String,
    pub shape: Vec<u64>,
    pub fragments: Vec<Fragment>,
    /// Whether it holds expert weights, which always have the output dtype.
    pub grouped: bool,
    /// Whether its first axis counts experts.
    pub expert_axis: bool,
    /// The dtype that published checkpoints have, where the mapping says so and it is none of them.
    pub dtype: Option<DType>,
}

/// Counts of what is left out, by reason.
pub(super) type DroppedCounts = BTreeMap<String, u64>;

/// The checkpoint's logical tensors by name.
pub(super) type LogicalTensors = BTreeMap<String, LogicalTensor>;
