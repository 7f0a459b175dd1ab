//! Encodes one chunk of a quantized tensor of the view: the codes of some rows of a matrix, or the
//! scales of its blocks.
//!
//! The matrix's rows are first decoded to F32, like a tensor of the view, at most one row of scale
//! blocks at a time. The scale of a block follows from its largest magnitude, or is read from the
//! original checkpoint if the plan says so. Finally the rows are encoded with these scales.

use crate::tensor::{to_u64, to_usize};
use std::cell::RefCell;
use std::ops::Range;

use super::decode::{ChunkDecoder, DecodeError};
use crate::codec::{Scales, block_amax, encode, f32_to_scale, scale_to_f32};
use crate::plan::{
    ChunkBox, Encoded, EncodedMatrix, Facet, Matrix, MatrixId, Member, ScaleBand, ScaleOf,
};
use crate::source::Checkpoint;
use crate::tensor::DType;

/// Rows that are encoded at a time if each row has its own scales.
const BATCH_ROWS: u64 = 128;

/// Buffers of a thread, reused from chunk to chunk.
#[derive(Default)]
struct EncodeBuffers {
    /// The rows to encode.
    values: Values,
    /// The rows whose magnitudes give the scales.
    others: Values,
    scales: Vec<f32>,
    /// Scales of the original checkpoint, as stored.
    stored: Vec<u8>,
}

/// Rows of a matrix as F32: the bytes that the decoder writes, and the numbers.
#[derive(Default)]
struct Values {
    bytes: Vec<u8>,
    numbers: Vec<f32>,
}

thread_local! {
    static BUFFERS: RefCell<EncodeBuffers> = RefCell::default();
}

/// Encodes chunks of one quantized matrix.
pub(super) struct ChunkEncoder<'a, F> {
    pub decoder: ChunkDecoder<'a>,
    /// The checkpoint that scales are taken from, if the plan names one.
    pub original: Option<&'a Checkpoint>,
    pub matrix_of: F,
    pub quantized: &'a EncodedMatrix,
}

impl<'m, F: Fn(MatrixId) -> &'m Matrix> ChunkEncoder<'_, F> {
    /// Fills `out` with the rows `chunk` of a payload or scale tensor.
    ///
    /// # Errors
    /// The error of the source.
    pub(super) fn fill(
        &self,
        facet: &Encoded,
        chunk: ChunkBox,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let first = chunk.plane * facet.grid.rows + chunk.row;
        let rows = first..first + chunk.rows;
        BUFFERS.with_borrow_mut(|buffers| match facet.facet {
            Facet::Payload => self.encode_payload(facet, rows, out, buffers),
            Facet::Scale => self.encode_scales(facet.member, rows, out, buffers),
        })
    }

    /// Writes the codes of rows `rows` of a member matrix to `out`.
    fn encode_payload(
        &self,
        facet: &Encoded,
        rows: Range<u64>,
        out: &mut [u8],
        buffers: &mut EncodeBuffers,
    ) -> Result<(), DecodeError> {
        let member = &self.quantized.members[facet.member];
        let block = self.quantized.block;
        let row_bytes = to_usize(facet.grid.row_bytes);
        let cols = to_usize(member.cols());
        let mut row = rows.start;
        while row < rows.end {
            let band = band_of(member, row);
            let step = if block[0] == 1 { BATCH_ROWS } else { block[0] };
            let until_block = if block[0] == 1 {
                row + step
            } else {
                band.rows_of(band.scale_row(row, block[0]), block[0]).end
            };
            let end = until_block.min(band.rows.end).min(rows.end).min(member.plane_end(row));
            self.load_scales(band, row..end, member, buffers)?;
            self.decode_rows(member, row..end, &mut buffers.values)?;
            let n = to_usize(end - row);
            let block_row = row - band.rows.start + band.skip;
            let scales = Scales {
                values: &buffers.scales,
                stride: to_usize(member.scale_cols),
                block: [to_usize(block[0]), to_usize(block[1])],
                phase: [to_usize(block_row % block[0]), 0],
            };
            let at = to_usize(row - rows.start) * row_bytes;
            let code = self.quantized.scheme.code();
            let numbers = &buffers.values.numbers;
            encode(code, numbers, cols, n, cols, Some(&scales), &mut out[at..], row_bytes);
            row = end;
        }
        Ok(())
    }

    /// Loads the scales of some rows of a band into `buffers.scales`, computed or read from the
    /// original. The first scale row is the one of the first row.
    fn load_scales(
        &self,
        band: &ScaleBand<ScaleOf>,
        rows: Range<u64>,
        member: &Member,
        buffers: &mut EncodeBuffers,
    ) -> Result<(), DecodeError> {
        let block = self.quantized.block[0];
        let first = band.scale_row(rows.start, block);
        let last = band.scale_row(rows.end - 1, block);
        let n = to_usize(last - first + 1) * to_usize(member.scale_cols);
        match band.scale {
            ScaleOf::Member(of) => self.compute_scales(of, first..last + 1, buffers),
            ScaleOf::Original(id) => {
                let code = self.quantized.scale;
                let width = code.bytes();
                buffers.stored.resize(n * width, 0);
                let at = first * member.scale_cols * to_u64(width);
                let original = self.original.expect("the plan took the scales from it");
                original.read(id, at, &mut buffers.stored)?;
                buffers.scales.resize(n, 0.0);
                scale_to_f32(code, &buffers.stored, &mut buffers.scales);
                // With a scale of 0 all codes are zero. Encode with 1 instead: 0 / 0 is a NaN.
                buffers.scales.iter_mut().filter(|s| **s == 0.0).for_each(|s| *s = 1.0);
                Ok(())
            }
        }
    }

    /// Writes rows `rows` of a member's scale tensor to `out`.
    fn encode_scales(
        &self,
        member: usize,
        rows: Range<u64>,
        out: &mut [u8],
        buffers: &mut EncodeBuffers,
    ) -> Result<(), DecodeError> {
        let width = self.quantized.scale.bytes();
        let row_bytes = to_usize(self.quantized.members[member].scale_cols) * width;
        let mut row = rows.start;
        while row < rows.end {
            let end = (row + BATCH_ROWS).min(rows.end);
            self.compute_scales(member, row..end, buffers)?;
            let at = to_usize(row - rows.start) * row_bytes;
            let bytes = &mut out[at..][..to_usize(end - row) * row_bytes];
            f32_to_scale(self.quantized.scale, &buffers.scales, bytes);
            row = end;
        }
        Ok(())
    }

    /// Computes rows of a member's scale tensor into `buffers.scales` from the largest magnitudes
    /// of all blocks that they scale. Those blocks may be in several members.
    fn compute_scales(
        &self,
        of: usize,
        scale_rows: Range<u64>,
        buffers: &mut EncodeBuffers,
    ) -> Result<(), DecodeError> {
        let EncodedMatrix { scheme, scale, block, ref members } = *self.quantized;
        let cols = to_usize(members[of].scale_cols);
        buffers.scales.clear();
        buffers.scales.resize(to_usize(scale_rows.end - scale_rows.start) * cols, 0.0);
        for member in members {
            let scaled = |b: &&ScaleBand<ScaleOf>| b.scale == ScaleOf::Member(of);
            for band in member.bands.iter().filter(scaled) {
                let mut row = scale_rows.start;
                while row < scale_rows.end {
                    let first = band.rows_of(row, block[0]);
                    if first.is_empty() {
                        row += 1;
                        continue;
                    }
                    // If each row has its own scales: all consecutive rows at once.
                    let end = if block[0] == 1 {
                        (first.start + (scale_rows.end - row))
                            .min(band.rows.end)
                            .min(member.plane_end(first.start))
                    } else {
                        first.end
                    };
                    self.decode_rows(member, first.start..end, &mut buffers.others)?;
                    let numbers = &buffers.others.numbers;
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
                            let so_far = &mut buffers.scales[line + c];
                            // A NaN is kept: no comparison with it is true.
                            if amax > *so_far || amax.is_nan() {
                                *so_far = amax;
                            }
                        }
                    }
                    row += served;
                }
            }
        }
        for value in &mut buffers.scales {
            *value = scheme.scale_of(scale, *value);
        }
        Ok(())
    }

    /// Decodes rows of a member to F32. They must be in one plane.
    fn decode_rows(
        &self,
        member: &Member,
        rows: Range<u64>,
        values: &mut Values,
    ) -> Result<(), DecodeError> {
        let cols = to_usize(member.cols());
        let n = to_usize(rows.end - rows.start) * cols;
        values.bytes.resize(n * 4, 0);
        let plane_rows = member.values.grid.rows;
        let chunk = ChunkBox {
            plane: rows.start / plane_rows,
            row: rows.start % plane_rows,
            rows: rows.end - rows.start,
        };
        self.decoder.fill(
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

/// The scale band that contains a row.
fn band_of(member: &Member, row: u64) -> &ScaleBand<ScaleOf> {
    let i = member.bands.partition_point(|b| b.rows.end <= row);
    &member.bands[i]
}
