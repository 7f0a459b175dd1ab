//! The plan of a view: for every tensor that it shows, where its bytes come from.
//!
//! A plan is built once, at mount, from a checkpoint's headers and a mapping; whatever can be
//! refused is refused here. It is immutable and holds no bytes; `read` carries it out.

mod assemble;
mod build;
mod companions;
mod complete;
mod cover;
mod detect;
mod directories;
mod grid;
mod group;
mod matrix;
mod options;
mod orphans;
mod problems;
mod quantize;
mod show;
mod slice;
mod sources;
mod stated;
mod wholes;

use std::ops::Range;
use std::sync::Arc;

pub(crate) use grid::{ChunkBox, Grid};
pub use matrix::ScaleReading;
pub(crate) use matrix::{Matrix, MatrixScales, ScaleBand};
pub use options::{PlanOptions, Quantize, Unmapped};
pub use problems::PlanError;
pub(crate) use problems::Problem;
pub use show::Summary;
pub use slice::{ExpertParallel, ExpertShard};

use crate::codec::{ScaleCode, Scheme};
use crate::mapping::QuantizationConfig;
use crate::source::{Checkpoint, SourceId};
use crate::tensor::{BoxMap, DType, Float, Shape};

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

/// Everything that a view shows.
#[derive(Debug)]
pub struct Plan {
    /// Every tensor of every directory, in the order in which shards hold them.
    pub tensors: Vec<TensorPlan>,
    /// What the tensors are computed from.
    pub(crate) matrices: Vec<Matrix>,
    /// Matrices that tensors hold quantized.
    pub(crate) quantized: Vec<EncodedMatrix>,
    /// The checkpoint that scales are taken from.
    pub(crate) original: Option<Arc<Checkpoint>>,
    /// The checkpoints that the view offers; the first is the root.
    pub directories: Vec<Directory>,
    /// What config.json says of the tensors.
    pub(crate) stated: Stated,
    /// What the mount reports.
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

    /// A matrix that tensors hold quantized.
    pub(crate) fn quantized(&self, id: EncodedMatrixId) -> &EncodedMatrix {
        &self.quantized[usize::try_from(id.0).expect("a usize has at least 32 bits")]
    }

    /// A matrix that tensors are computed from.
    pub(crate) fn matrix(&self, id: MatrixId) -> &Matrix {
        &self.matrices[id.index()]
    }
}

/// One checkpoint within the view: the whole model, or an expert-parallel rank's part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    /// Name below the root; empty for the root itself.
    pub name: String,
    /// Its tensors, in the order in which shards hold them.
    pub tensors: Vec<TensorId>,
}

/// What the view's config.json says of the view's tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Stated {
    /// How they are quantized; `None` where none is.
    pub quantization: Option<QuantizationConfig>,
    /// The dtype that most of them have, where they are not quantized; `None` where all are.
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
    /// Where its bytes come from.
    pub(crate) body: Body,
}

impl TensorPlan {
    /// Bytes of the tensor.
    pub fn bytes(&self) -> u64 {
        self.shape.bytes(self.dtype).expect("the planner checked the size")
    }

    /// Whether every byte is a byte of the source.
    pub fn is_verbatim(&self) -> bool {
        matches!(self.body, Body::Verbatim(_))
    }
}

/// Where a tensor's bytes come from.
#[derive(Debug)]
pub(crate) enum Body {
    /// Runs of source bytes, one behind the other.
    Verbatim(Vec<SourceRange>),
    /// Fragments that are decoded, cast or moved.
    Computed(Computed),
    /// Payload or scales of a matrix that the view holds quantized.
    Encoded(Encoded),
    /// Bytes that the plan holds.
    Literal(Box<[u8]>),
}

/// Position of a matrix in [`Plan::quantized`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct EncodedMatrixId(pub u32);

/// A facet of a quantized matrix, in chunks of whole rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Encoded {
    /// How the tensor is cut into chunks. Rows are those of the matrix, or of the scales.
    pub grid: Grid,
    /// The matrix.
    pub quantized: EncodedMatrixId,
    /// Which of the matrices that share scales.
    pub member: usize,
    /// What of it.
    pub facet: Facet,
}

/// Which tensor of a quantized matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Facet {
    /// The codes.
    Payload,
    /// The scales, made from the largest magnitude of each block.
    Scale,
}

/// A matrix that the view holds quantized; two where a block reaches over both.
#[derive(Debug)]
pub(crate) struct EncodedMatrix {
    /// Codes and geometry.
    pub scheme: Scheme,
    /// How scales are stored.
    pub scale: ScaleCode,
    /// Rows and columns that one scale serves.
    pub block: [u64; 2],
    /// The matrices.
    pub members: Vec<Member>,
}

/// One matrix of a [`EncodedMatrix`].
#[derive(Debug)]
pub(crate) struct Member {
    /// Extents of the matrix.
    pub shape: Shape,
    /// Its numbers, as F32.
    pub values: Computed,
    /// Which scale rows serve which rows; in order, without gaps.
    pub bands: Vec<ScaleBand<ScaleOf>>,
    /// Scales in a row of its scale tensor.
    pub scale_cols: u64,
}

impl Member {
    /// Columns of the matrix.
    pub(crate) fn cols(&self) -> u64 {
        self.shape.dims().last().copied().unwrap_or(1)
    }

    /// First row behind the plane that `row` lies in.
    pub(crate) fn plane_end(&self, row: u64) -> u64 {
        (row / self.values.grid.rows + 1) * self.values.grid.rows
    }
}

/// Where the scales of a band are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScaleOf {
    /// In the scale tensor of this member, made from its blocks.
    Member(usize),
    /// In a tensor of the original checkpoint.
    Original(SourceId),
}

/// Which checkpoint a run is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    /// The one that is mounted.
    Source,
    /// The one that scales are taken from.
    Original,
}

/// A run of bytes that a source tensor holds as the view shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SourceRange {
    /// First byte within the view's tensor.
    pub at: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// The checkpoint that holds it.
    pub origin: Origin,
    /// The tensor of that checkpoint.
    pub source: SourceId,
    /// First byte within that tensor.
    pub offset: u64,
}

/// A tensor that is computed in chunks of whole rows.
#[derive(Debug)]
pub(crate) struct Computed {
    /// How it is cut into chunks.
    pub grid: Grid,
    /// Disjoint fragments that cover it, in the order of their targets.
    pub fragments: Vec<Fragment>,
    /// For each plane, the positions of the fragments that reach into it; empty where all
    /// fragments do.
    planes: Vec<Range<u32>>,
}

impl Computed {
    /// Fragments that may reach into a plane of the grid.
    pub(crate) fn fragments_of(&self, plane: u64) -> &[Fragment] {
        let wide = |i: u32| usize::try_from(i).expect("a usize has at least 32 bits");
        match usize::try_from(plane).ok().and_then(|p| self.planes.get(p)) {
            Some(range) => &self.fragments[wide(range.start)..wide(range.end)],
            None => &self.fragments,
        }
    }
}

/// A box of the view's tensor and the box of a matrix that it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    /// Target: the view's tensor. Source: the matrix.
    pub map: BoxMap,
    /// The matrix.
    pub matrix: MatrixId,
}
