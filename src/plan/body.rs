//! Where the bytes of a view tensor come from.

use std::ops::Range;

use super::{Fragment, Grid, ScaleBand};
use crate::codec::{ScaleCode, Scheme};
use crate::source::SourceId;
use crate::tensor::Shape;

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
    pub(super) planes: Vec<Range<u32>>,
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
