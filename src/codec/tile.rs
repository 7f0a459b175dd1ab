//! The input of the decoders: element codes, scales, and boxes of a stored matrix.

use crate::tensor::Float;

/// Encoding of one element of a stored matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// FP8 E4M3FN (OCP OFP8 1.0): bias 7, no infinities, 0x7F and 0xFF are NaN, largest 448.
    E4M3,
    /// FP4 E2M1 (OCP MX 1.0): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, -0.0 among them.
    E2M1,
    /// 4-bit integer from -8 to 7, stored plus 8 (compressed-tensors `pack-quantized`).
    Int4,
    /// bfloat16, little-endian.
    BF16,
    /// IEEE 754 binary16, little-endian.
    F16,
    /// IEEE 754 binary32, little-endian.
    F32,
}

impl Code {
    /// Bits of one element. Codes of 4 bits are packed two to a byte, the even column in the low
    /// nibble.
    pub fn bits(self) -> u32 {
        match self {
            Code::E2M1 | Code::Int4 => 4,
            Code::E4M3 => 8,
            Code::BF16 | Code::F16 => 16,
            Code::F32 => 32,
        }
    }

    /// The float type of an unquantized code, or `None` for a quantized one.
    pub fn as_float(self) -> Option<Float> {
        match self {
            Code::E4M3 | Code::E2M1 | Code::Int4 => None,
            Code::BF16 => Some(Float::BF16),
            Code::F16 => Some(Float::F16),
            Code::F32 => Some(Float::F32),
        }
    }

    /// Bytes of `cols` neighbouring elements of a row that start at an even column.
    pub fn row_bytes(self, cols: usize) -> usize {
        match self {
            Code::E2M1 | Code::Int4 => cols.div_ceil(2),
            Code::E4M3 => cols,
            Code::BF16 | Code::F16 => 2 * cols,
            Code::F32 => 4 * cols,
        }
    }
}

/// The scales of a tile, one for each block of elements.
///
/// Element `(r, c)` has
/// `values[((r + phase[0]) / block[0]) * stride + (c + phase[1]) / block[1]]`.
#[derive(Clone, Copy, Debug)]
pub struct Scales<'a> {
    /// The scales, row-major.
    pub values: &'a [f32],
    /// Number of scales from one row of scales to the next.
    pub stride: usize,
    /// Rows and columns of elements that share a scale; both above 0.
    pub block: [usize; 2],
    /// Row and column of the tile's first element, counted from the first element that
    /// `values[0]` covers.
    pub phase: [usize; 2],
}

impl Scales<'_> {
    /// A scale of 1 for every element.
    pub(super) const ONE: Scales<'static> =
        Scales { values: &[1.0], stride: 0, block: [usize::MAX; 2], phase: [0; 2] };

    /// The scale of element `(row, col)`.
    ///
    /// # Panics
    /// If `values` is too short or a block extent is 0.
    pub fn at(&self, row: usize, col: usize) -> f32 {
        let row = (row + self.phase[0]) / self.block[0];
        self.values[row * self.stride + (col + self.phase[1]) / self.block[1]]
    }

    /// The scales of the sub-tile that starts at element `(row, col)`.
    pub(super) fn offset_by(self, row: usize, col: usize) -> Self {
        Scales { phase: [self.phase[0] + row, self.phase[1] + col], ..self }
    }

    /// The `rows` rows of a tile, cut where one row of scales ends; a run's index is the row in
    /// `values`.
    pub(super) fn row_runs(&self, rows: usize) -> ScaleRuns {
        ScaleRuns::new(rows, self.block[0], self.phase[0])
    }

    /// The `cols` columns of a tile, cut where one scale ends; a run's index is the column in
    /// `values`.
    pub(super) fn col_runs(&self, cols: usize) -> ScaleRuns {
        ScaleRuns::new(cols, self.block[1], self.phase[1])
    }
}

/// A 2-D box of a stored matrix, in the matrix's own orientation.
#[derive(Clone, Copy, Debug)]
pub struct Tile<'a> {
    /// Encoding of the elements.
    pub code: Code,
    /// The rows, `stride` bytes apart. A tile of 4-bit codes starts at an even column of the
    /// matrix.
    pub bytes: &'a [u8],
    /// Bytes from one row to the next.
    pub stride: usize,
    /// Rows of the box.
    pub rows: usize,
    /// Columns of the box, in elements.
    pub cols: usize,
    /// The scales, or `None` if the elements are not scaled.
    pub scales: Option<Scales<'a>>,
}

impl<'a> Tile<'a> {
    /// The scales; 1 for every element if the tile has none.
    #[inline]
    pub(super) fn scales(&self) -> Scales<'a> {
        self.scales.unwrap_or(Scales::ONE)
    }

    /// Bytes of row `row`.
    pub(super) fn row(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.stride..][..self.code.row_bytes(self.cols)]
    }

    /// The sub-tile of `rows` by `cols` elements at `(row, col)`; `col` is even for 4-bit codes.
    pub(super) fn sub_tile(&self, row: usize, rows: usize, col: usize, cols: usize) -> Tile<'a> {
        Tile {
            bytes: &self.bytes[row * self.stride + self.code.row_bytes(col)..],
            rows,
            cols,
            scales: self.scales.map(|s| s.offset_by(row, col)),
            ..*self
        }
    }
}

/// Orientation of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Orientation {
    /// Element `(r, c)` of the box is element `(r, c)` of the output.
    Straight,
    /// Element `(r, c)` of the box is element `(c, r)` of the output.
    Transposed,
}

/// Neighbouring rows or columns of a tile that lie in one scale block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ScaleRun {
    /// First row or column, counted from the tile's.
    pub start: usize,
    /// Number of rows or columns; above 0.
    pub len: usize,
    /// Index of the scale block.
    pub index: usize,
}

/// Iterator over the runs of an axis, in order.
#[derive(Clone)]
pub(super) struct ScaleRuns {
    next: ScaleRun,
    end: usize,
    block: usize,
}

impl ScaleRuns {
    /// A single run, in block 0.
    pub(super) fn single(end: usize) -> ScaleRuns {
        ScaleRuns::new(end, usize::MAX, 0)
    }

    fn new(end: usize, block: usize, phase: usize) -> ScaleRuns {
        let next = ScaleRun { start: 0, len: block - phase % block, index: phase / block };
        ScaleRuns { next, end, block }
    }
}

/// The runs of a row with the whole blocks separated from the partial ones at both ends, so that
/// the loop over whole blocks needs no division.
#[derive(Clone)]
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "the portable level takes `all`")
)]
pub(super) struct SplitRuns {
    /// All runs.
    pub all: ScaleRuns,
    /// Columns of a whole block.
    pub block: usize,
    /// Number of whole blocks.
    pub blocks: usize,
    /// The end of a partial first block; may be empty.
    pub head: ScaleRun,
    /// All whole blocks, with the index of the first; may be empty.
    pub body: ScaleRun,
    /// The start of a partial last block; may be empty.
    pub tail: ScaleRun,
}

impl ScaleRuns {
    /// Separates the whole blocks from the partial ones.
    pub(super) fn split(self) -> SplitRuns {
        let ScaleRuns { next: first, end, block } = self.clone();
        let head = if first.len < block { first.len.min(end) } else { 0 };
        let tail = (end - head) % block;
        let index = first.index + usize::from(head > 0);
        let body = ScaleRun { start: head, len: end - head - tail, index };
        let blocks = body.len / block;
        let tail = ScaleRun { start: end - tail, len: tail, index: index + blocks };
        SplitRuns { all: self, block, blocks, head: ScaleRun { len: head, ..first }, body, tail }
    }
}

impl Iterator for ScaleRuns {
    type Item = ScaleRun;

    fn next(&mut self) -> Option<ScaleRun> {
        let left = self.end - self.next.start;
        if left == 0 {
            return None;
        }
        let run = ScaleRun { len: self.next.len.min(left), ..self.next };
        self.next = ScaleRun { start: run.start + run.len, len: self.block, index: run.index + 1 };
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_follow_the_phase() {
        let scales = Scales { values: &[], stride: 0, block: [4, 3], phase: [6, 0] };
        let rows: Vec<_> = scales.row_runs(7).map(|r| (r.start, r.len, r.index)).collect();
        assert_eq!(rows, [(0, 2, 1), (2, 4, 2), (6, 1, 3)]);
        let cols: Vec<_> = scales.col_runs(3).map(|r| (r.start, r.len, r.index)).collect();
        assert_eq!(cols, [(0, 3, 0)]);
        assert_eq!(scales.col_runs(0).count(), 0);
    }

    #[test]
    fn splitting_keeps_the_runs() {
        for (end, block, phase) in [
            (7, 4, 6),
            (10, 4, 0),
            (10, 4, 3),
            (8, 4, 8),
            (2, 4, 1),
            (3, 4, 0),
            (0, 4, 1),
            (5, 1, 2),
        ] {
            let runs = ScaleRuns::new(end, block, phase);
            let mut joined = Vec::new();
            let SplitRuns { head, body, tail, .. } = runs.clone().split();
            for part in [head, body, tail] {
                let whole = part.len / block * block;
                for at in (0..whole).step_by(block) {
                    let (start, index) = (part.start + at, part.index + at / block);
                    joined.push(ScaleRun { start, len: block, index });
                }
                if part.len > whole {
                    joined.push(part);
                }
            }
            assert_eq!(runs.collect::<Vec<_>>(), joined, "{end} by {block} from {phase}");
        }
    }

    #[test]
    fn row_bytes_are_rounded_up() {
        for (code, cols, bytes) in [
            (Code::E2M1, 5, 3),
            (Code::Int4, 4, 2),
            (Code::E4M3, 5, 5),
            (Code::BF16, 5, 10),
            (Code::F16, 0, 0),
            (Code::F32, 5, 20),
        ] {
            assert_eq!(code.row_bytes(cols), bytes, "{code:?} {cols}");
        }
    }
}
