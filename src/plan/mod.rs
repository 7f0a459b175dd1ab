#![doc = include_str!("README.md")]

mod arrange;
mod body;
mod build;
mod fragment;
mod gather;
mod grid;
mod lay_out;
mod matrix;
mod options;
mod report;

use std::sync::Arc;

pub(crate) use body::{
    Body, Computed, Encoded, EncodedMatrix, EncodedMatrixId, Facet, Member, Origin, ScaleOf,
    SourceRange,
};
pub(crate) use fragment::Fragment;
pub(crate) use grid::{ChunkBox, Grid};
pub use lay_out::{ExpertParallel, ExpertShard};
pub use matrix::ScaleReading;
pub(crate) use matrix::{Matrix, MatrixScales, ScaleBand};
pub use options::{PlanOptions, Quantize, Unmapped};
pub(crate) use report::Problem;
pub use report::{PlanError, Summary};

use crate::mapping::QuantizationConfig;
use crate::source::Checkpoint;
use crate::tensor::{DType, Float, Shape};

/// Position of a tensor in [`Plan::tensors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(pub u32);

impl TensorId {
    /// The position as an index.
    pub fn index(self) -> usize {
        usize::try_from(self.0).expect("a usize has at least 32 bits")
    }
}

/// Position of a matrix in [`Plan::matrices`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct MatrixId(pub u32);

impl MatrixId {
    /// The position as an index.
    pub(crate) fn index(self) -> usize {
        usize::try_from(self.0).expect("a usize has at least 32 bits")
    }
}

/// Every tensor of a view and where its bytes come from. Built once by [`Plan::build`], immutable.
#[derive(Debug)]
pub struct Plan {
    /// Every tensor of every directory, in the order in which shards hold them.
    pub tensors: Vec<TensorPlan>,
    /// The matrices of the source, sorted by the ids of their payloads.
    pub(crate) matrices: Vec<Matrix>,
    /// Matrices that the view quantizes.
    pub(crate) quantized: Vec<EncodedMatrix>,
    /// The original checkpoint, where scales are taken from one.
    pub(crate) original: Option<Arc<Checkpoint>>,
    /// The directories of the view; the first is the root.
    pub directories: Vec<Directory>,
    /// What the view's config.json must say about the tensors.
    pub(crate) config_entries: ConfigEntries,
    /// The line that the mount reports.
    pub summary: Summary,
}

impl Plan {
    /// The plan of a tensor.
    pub fn tensor(&self, id: TensorId) -> &TensorPlan {
        &self.tensors[id.index()]
    }

    /// The tensor of this name in the root of the view.
    pub fn find(&self, name: &str) -> Option<TensorId> {
        let mut root = self.directories.first()?.tensors.iter();
        root.find(|id| *self.tensor(**id).name == *name).copied()
    }

    /// A matrix that the view quantizes.
    pub(crate) fn quantized(&self, id: EncodedMatrixId) -> &EncodedMatrix {
        &self.quantized[usize::try_from(id.0).expect("a usize has at least 32 bits")]
    }

    /// A matrix of the source.
    pub(crate) fn matrix(&self, id: MatrixId) -> &Matrix {
        &self.matrices[id.index()]
    }
}

/// A directory of the view: the whole model, or the part of one expert-parallel rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    /// Name below the root; empty for the root itself.
    pub name: String,
    /// Its tensors, in the order in which shards hold them.
    pub tensors: Vec<TensorId>,
}

/// What the view's config.json must say about the view's tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ConfigEntries {
    /// `quantization_config`; `None` where no tensor is quantized.
    pub quantization: Option<QuantizationConfig>,
    /// The dtype of most elements of the tensors that are not quantized; `None` where there are
    /// none.
    pub dtype: Option<Float>,
}

/// A tensor of the view.
#[derive(Debug)]
pub struct TensorPlan {
    /// Name in the view.
    pub name: Box<str>,
    /// Element type in the view.
    pub dtype: DType,
    /// Extents in the view.
    pub shape: Shape,
    /// Where the bytes come from.
    pub(crate) body: Body,
}

impl TensorPlan {
    /// Bytes of the tensor.
    pub fn bytes(&self) -> u64 {
        self.shape.bytes(self.dtype).expect("the planner checked the size")
    }

    /// Whether the tensor consists of byte ranges of stored tensors.
    pub fn is_verbatim(&self) -> bool {
        matches!(self.body, Body::Verbatim(_))
    }
}
