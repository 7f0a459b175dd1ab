//! The body of a view tensor: where its bytes come from.

use std::ops::Range;

use super::{Fragment, Grid, ScaleBand};
use crate::codec::{ScaleCode, Scheme};
use crate::source::SourceId;
use crate::tensor::Shape;

/// Where a tensor's bytes come from.
#[derive(Debug)]
pub(crate) enum Body {
    /// Byte ranges of stored tensors, one after the other.
    Verbatim(Vec<SourceRange>),
    /// Fragments that are decoded, cast or rearranged.
    Computed(Computed),
    /// Payload or scales of a matrix that the view quantizes.
    Encoded(Encoded),
    /// Bytes that the plan itself holds.
    Literal(Box<[u8]>),
}

/// Position of a matrix in `Plan::quantized`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct EncodedMatrixId(pub u32);

/// A facet of a matrix that the view quantizes, in chunks of whole rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Encoded {
    /// How the tensor is cut into chunks. Rows are those of the matrix, or of the scale grid.
    pub grid: Grid,
    /// The matrix, or pair of matrices.
    pub quantized: EncodedMatrixId,
    /// Position in [`EncodedMatrix::members`].
    pub member: usize,
    /// Payload or scales.
    pub facet: Facet,
}

/// Which tensor of a quantized matrix this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Facet {
    /// The codes.
    Payload,
    /// The scales, computed from the largest magnitude of each block.
    Scale,
}

/// A matrix that the view quantizes, or a pair of matrices where a block can hold rows of both.
#[derive(Debug)]
pub(crate) struct EncodedMatrix {
    /// The quantization scheme.
    pub scheme: Scheme,
    /// How scales are stored.
    pub scale: ScaleCode,
    /// Rows and columns that one scale serves.
    pub block: [u64; 2],
    /// The matrix, or the two matrices of a pair.
    pub members: Vec<Member>,
}

/// One matrix of an [`EncodedMatrix`].
#[derive(Debug)]
pub(crate) struct Member {
    /// Extents of the matrix.
    pub shape: Shape,
    /// Its elements as F32, before they are quantized.
    pub values: Computed,
    /// Which scale rows serve which rows; in order, without gaps.
    pub bands: Vec<ScaleBand<ScaleOf>>,
    /// Scales per row of its scale tensor.
    pub scale_cols: u64,
}

impl Member {
    /// Columns of the matrix.
    pub(crate) fn cols(&self) -> u64 {
        self.shape.dims().last().copied().unwrap_or(1)
    }

    /// End of the plane that contains `row`.
    pub(crate) fn plane_end(&self, row: u64) -> u64 {
        (row / self.values.grid.rows + 1) * self.values.grid.rows
    }
}

/// Where the scales of a band come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScaleOf {
    /// They are computed: a facet of this member.
    Member(usize),
    /// They are stored in this tensor of the original checkpoint.
    Original(SourceId),
}

/// The checkpoint that a byte range is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    /// The mounted one.
    Source,
    /// The original, which scales are taken from.
    Original,
}

/// A byte range that a stored tensor holds exactly as the view shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SourceRange {
    /// Offset in the view's tensor.
    pub at: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// The checkpoint that holds it.
    pub origin: Origin,
    /// The tensor of that checkpoint.
    pub source: SourceId,
    /// Offset in that tensor.
    pub offset: u64,
}

/// A tensor that is computed in chunks of whole rows.
#[derive(Debug)]
pub(crate) struct Computed {
    /// How the tensor is cut into chunks.
    pub grid: Grid,
    /// Disjoint fragments that cover it, sorted by target.
    pub fragments: Vec<Fragment>,
    /// For each plane, the positions of its fragments. Empty where a fragment can span planes; then
    /// every fragment must be considered for every plane.
    pub(super) planes: Vec<Range<u32>>,
}

impl Computed {
    /// Fragments that may lie in a plane of the grid.
    pub(crate) fn fragments_of(&self, plane: u64) -> &[Fragment] {
        let wide = |i: u32| usize::try_from(i).expect("a usize has at least 32 bits");
        match usize::try_from(plane).ok().and_then(|p| self.planes.get(p)) {
            Some(range) => &self.fragments[wide(range.start)..wide(range.end)],
            None => &self.fragments,
        }
    }
}
