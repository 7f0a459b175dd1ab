//! Encodes one chunk of a facet: codes of rows of a matrix, or the scales of its blocks.
//!
//! The matrix's rows are decoded to F32 as if they were a tensor of the view, a block of rows that
//! share their scales at a time.

use crate::tensor::{to_u64, to_usize};
use std::cell::RefCell;
use std::ops::Range;

use super::chunk::{ChunkReader, Failure};
use crate::codec::{Scales, block_amax, encode, f32_to_scale, scale_to_f32};
use crate::plan::{
    ChunkBox, Encoded, EncodedMatrix, Facet, Matrix, MatrixId, Member, ScaleBand, ScaleOf,
};
use crate::source::Checkpoint;
use crate::tensor::DType;

/// Rows that are taken at a time where every row has scales of its own.
const ROWS_AT_A_TIME: u64 = 128;

/// Buffers that a thread keeps from chunk to chunk.
#[derive(Default)]
struct Scratch {
    values: Values,
    others: Values,
    scales: Vec<f32>,
    stored: Vec<u8>,
}

/// Rows of a matrix as F32: bytes as the decoder writes them, and the numbers.
#[derive(Default)]
struct Values {
    bytes: Vec<u8>,
    numbers: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What a facet is encoded from.
pub(super) struct Encoder<'a, F> {
    pub reader: ChunkReader<'a>,
    pub original: Option<&'a Checkpoint>,
    pub matrix_of: F,
    pub quantized: &'a EncodedMatrix,
}

impl<'m, F: Fn(MatrixId) -> &'m Matrix> Encoder<'_, F> {
    /// Fills `out` with the chunk at `chunk` of a facet.
    ///
    /// # Errors
    /// What the source fails with.
    pub(super) fn fill(
        &self,
        facet: &Encoded,
        chunk: ChunkBox,
        out: &mut [u8],
    ) -> Result<(), Failure> {
        let first = chunk.plane * facet.grid.rows + chunk.row;
        let rows = first..first + chunk.rows;
        SCRATCH.with_borrow_mut(|scratch| match facet.facet {
            Facet::Payload => self.payload(facet, rows, out, scratch),
            Facet::Scale => self.scales(facet.member, rows, out, scratch),
        })
    }

    /// Codes of matrix rows `rows` of a member.
    fn payload(
        &self,
        facet: &Encoded,
        rows: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let member = &self.quantized.members[facet.member];
        let block = self.quantized.block;
        let row_bytes = to_usize(facet.grid.row_bytes);
        let cols = to_usize(member.cols());
        let mut row = rows.start;
        while row < rows.end {
            let band = band_of(member, row);
            let step = if block[0] == 1 { ROWS_AT_A_TIME } else { block[0] };
            let until_block = if block[0] == 1 {
                row + step
            } else {
                band.rows_of(band.scale_row(row, block[0]), block[0]).end
            };
            let end = until_block.min(band.rows.end).min(rows.end).min(member.plane_end(row));
            self.scales_of(band, row..end, member, scratch)?;
            self.values(member, row..end, &mut scratch.values)?;
            let n = to_usize(end - row);
            let into = row - band.rows.start + band.skip;
            let scales = Scales {
                values: &scratch.scales,
                stride: to_usize(member.scale_cols),
                block: [to_usize(block[0]), to_usize(block[1])],
                phase: [to_usize(into % block[0]), 0],
            };
            let at = to_usize(row - rows.start) * row_bytes;
            let code = self.quantized.scheme.code();
            let numbers = &scratch.values.numbers;
            encode(code, numbers, cols, n, cols, Some(&scales), &mut out[at..], row_bytes);
            row = end;
        }
        Ok(())
    }

    /// Scales (into `scratch.scales`) of the rows of a band, from the first row's scale row on.
    fn scales_of(
        &self,
        band: &ScaleBand<ScaleOf>,
        rows: Range<u64>,
        member: &Member,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let block = self.quantized.block[0];
        let first = band.scale_row(rows.start, block);
        let last = band.scale_row(rows.end - 1, block);
        let n = to_usize(last - first + 1) * to_usize(member.scale_cols);
        match band.scale {
            ScaleOf::Member(of) => self.made(of, first..last + 1, scratch),
            ScaleOf::Original(id) => {
                let code = self.quantized.scale;
                let width = code.bytes();
                scratch.stored.resize(n * width, 0);
                let at = first * member.scale_cols * to_u64(width);
                let original = self.original.expect("the plan took the scales from it");
                original.read(id, at, &mut scratch.stored)?;
                scratch.scales.resize(n, 0.0);
                scale_to_f32(code, &scratch.stored, &mut scratch.scales);
                // Under a scale of 0 every code is a zero, but 0 / 0 would be a NaN.
                scratch.scales.iter_mut().filter(|s| **s == 0.0).for_each(|s| *s = 1.0);
                Ok(())
            }
        }
    }

    /// Scale rows of a member's scale tensor, as they are stored.
    fn scales(
        &self,
        member: usize,
        rows: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let width = self.quantized.scale.bytes();
        let row_bytes = to_usize(self.quantized.members[member].scale_cols) * width;
        let mut row = rows.start;
        while row < rows.end {
            let end = (row + ROWS_AT_A_TIME).min(rows.end);
            self.made(member, row..end, scratch)?;
            let at = to_usize(row - rows.start) * row_bytes;
            let bytes = &mut out[at..][..to_usize(end - row) * row_bytes];
            f32_to_scale(self.quantized.scale, &scratch.scales, bytes);
            row = end;
        }
        Ok(())
    }

    /// Makes scale rows of a member's scale tensor (into `scratch.scales`) from the largest
    /// magnitudes of all rows that they serve, in whichever member those are.
    fn made(
        &self,
        of: usize,
        scale_rows: Range<u64>,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let EncodedMatrix { scheme, scale, block, ref members } = *self.quantized;
        let cols = to_usize(members[of].scale_cols);
        scratch.scales.clear();
        scratch.scales.resize(to_usize(scale_rows.end - scale_rows.start) * cols, 0.0);
        for member in members {
            let serving = |b: &&ScaleBand<ScaleOf>| b.scale == ScaleOf::Member(of);
            for band in member.bands.iter().filter(serving) {
                let mut row = scale_rows.start;
                while row < scale_rows.end {
                    let first = band.rows_of(row, block[0]);
                    if first.is_empty() {
                        row += 1;
                        continue;
                    }
                    // Where each row has its own scales, as many as lie together.
                    let end = if block[0] == 1 {
                        (first.start + (scale_rows.end - row))
                            .min(band.rows.end)
                            .min(member.plane_end(first.start))
                    } else {
                        first.end
                    };
                    self.values(member, first.start..end, &mut scratch.others)?;
                    let numbers = &scratch.others.numbers;
                    let served = if block[0] == 1 { end - first.start } else { 1 };
                    let height = if block[0] == 1 { 1 } else { to_usize(end - first.start) };
                    let width = to_usize(member.cols());
                    for i in 0..served {
                        let line = to_usize(row - scale_rows.start + i) * cols;
                        for c in 0..cols {
                            let from = c * to_usize(block[1]);
                            let wide = to_usize(block[1]).min(width - from);
                            let start = to_usize(i) * width + from;
                            let amax = block_amax(&numbers[start..], width, height, wide);
                            let so_far = &mut scratch.scales[line + c];
                            // A NaN stays: nothing is greater.
                            if amax > *so_far || amax.is_nan() {
                                *so_far = amax;
                            }
                        }
                    }
                    row += served;
                }
            }
        }
        for value in &mut scratch.scales {
            *value = scheme.scale_of(scale, *value);
        }
        Ok(())
    }

    /// Rows of a member as F32; they lie in one plane.
    fn values(
        &self,
        member: &Member,
        rows: Range<u64>,
        values: &mut Values,
    ) -> Result<(), Failure> {
        let cols = to_usize(member.cols());
        let n = to_usize(rows.end - rows.start) * cols;
        values.bytes.resize(n * 4, 0);
        let plane_rows = member.values.grid.rows;
        let chunk = ChunkBox {
            plane: rows.start / plane_rows,
            row: rows.start % plane_rows,
            rows: rows.end - rows.start,
        };
        self.reader.fill(
            &member.values,
            &self.matrix_of,
            &member.shape,
            DType::F32,
            chunk,
            &mut values.bytes,
        )?;
        values.numbers.clear();
        let (numbers, _) = values.bytes.as_chunks();
        values.numbers.extend(numbers.iter().map(|b| f32::from_le_bytes(*b)));
        Ok(())
    }
}

fn band_of(member: &Member, row: u64) -> &ScaleBand<ScaleOf> {
    let i = member.bands.partition_point(|b| b.rows.end <= row);
    &member.bands[i]
}
