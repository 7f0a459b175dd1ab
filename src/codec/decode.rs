//! Decodes tiles into rows of floats, either as they are stored (straight) or transposed.
//!
//! A transposed tile is decoded strip by strip, so that everything between source and output stays
//! in the cache:
//!
//! ```text
//! source rows --copy--> codes of a strip --decode--> floats of a strip --transpose--> output rows
//!                       (padded rows: columns do not collide in one set of the L1 cache)
//! ```
//!
//! FP8 codes that are decoded by a table are transposed first and looked up afterwards: codes are
//! half as many bytes as 16-bit floats.

use super::float::Half;
use super::fp8::Fp8Table;
use super::rows::{DecodeMethod, RowDecoder, RowOutput};
use super::scratch::{
    self, KernelScratch, ROW_PAD_BYTES, STRIP_COLS, STRIP_OUT_ROW_BYTES, STRIP_SOURCE_ROW_BYTES,
};
use super::simd::NonTemporalStores;
use super::tile::{ScaleRun, Scales};
use super::{Level, Orientation, Tile, copy2d_at};
use crate::tensor::Float;

/// If fewer rows than this share a scale, the scales of the next strip are prefetched: they are
/// then a sizeable stream of memory next to the codes.
const SCALE_PREFETCH_MAX_BLOCK_ROWS: usize = 8;

/// Decodes a tile into floats of type `to`.
///
/// Element `(r, c)` is written to row `r`, column `c` of the output (straight) or to row `c`,
/// column `r` (transposed); its first byte is `out[row * out_stride + col * to.bytes()]`. All other
/// bytes of `out` keep their contents. The value is `f32(code) * f32(scale)`, rounded once to `to`;
/// without scales it is the value of the code, and floats that are already of type `to` keep their
/// bits.
///
/// Fastest where the address of `out` and `out_stride` are multiples of 64 bytes. Outputs that span
/// 4 MiB or more are written with non-temporal stores.
///
/// # Panics
/// If the tile's bytes, its scales or `out` are too short for the tile.
pub(crate) fn decode(
    tile: &Tile<'_>,
    to: Float,
    orientation: Orientation,
    out: &mut [u8],
    out_stride: usize,
) {
    decode_at(Level::best(), tile, to, orientation, out, out_stride);
}

/// Does what `decode` does with the kernels of a given level.
///
/// # Panics
/// As `decode`.
pub fn decode_at(
    level: Level,
    tile: &Tile<'_>,
    to: Float,
    orientation: Orientation,
    out: &mut [u8],
    out_stride: usize,
) {
    let Tile { bytes, stride, rows, cols, .. } = *tile;
    if rows == 0 || cols == 0 {
        return;
    }
    if tile.scales.is_none() && tile.code.as_float() == Some(to) {
        let width = to.bytes();
        return copy2d_at(level, width, bytes, stride, rows, cols, orientation, out, out_stride);
    }
    scratch::with(|scratch| match orientation {
        Orientation::Straight => straight(level, tile, to, out, out_stride, scratch),
        Orientation::Transposed => transposed(level, tile, to, out, out_stride, scratch),
    });
}

fn straight(
    level: Level,
    tile: &Tile<'_>,
    to: Float,
    out: &mut [u8],
    out_stride: usize,
    scratch: &mut KernelScratch,
) {
    let mut rows = RowDecoder { level, to, tables: &mut scratch.tables };
    let mut output = match level.non_temporal_stores(tile.rows * out_stride) {
        Some(non_temporal) => RowOutput::NonTemporal {
            non_temporal,
            staging: &mut scratch.floats.0,
            out,
            stride: out_stride,
        },
        None => RowOutput::Memory { out, stride: out_stride },
    };
    rows.decode(tile, &mut output);
}

fn transposed(
    level: Level,
    tile: &Tile<'_>,
    to: Float,
    out: &mut [u8],
    out_stride: usize,
    scratch: &mut KernelScratch,
) {
    let width = to.bytes();
    let strip_rows = STRIP_OUT_ROW_BYTES / width;
    let strip_cols = STRIP_COLS.min(STRIP_SOURCE_ROW_BYTES * 8 / tile.code.bits() as usize);
    let non_temporal = level.non_temporal_stores(tile.cols * out_stride);
    let scales = tile.scales();
    // Strips end where scale blocks of 128 end, whatever the phase. A strip of 4-bit codes has to
    // start at an even column.
    let phase = if tile.code.bits() < 8 { scales.phase[1] & !1 } else { scales.phase[1] };
    let mut col = 0;
    while col < tile.cols {
        let wide = (strip_cols - (col + phase) % strip_cols).min(tile.cols - col);
        let mut row = 0;
        while row < tile.rows {
            let high = strip_rows - (row + scales.phase[0]) % strip_rows;
            let high = high.min(tile.rows - row);
            let out = &mut out[col * out_stride + row * width..];
            let tile = tile.sub_tile(row, high, col, wide);
            transposed_strip(level, &tile, to, out, out_stride, non_temporal.as_ref(), scratch);
            row += high;
        }
        col += wide;
    }
}

/// Decodes and transposes one strip. Copies its codes into the cache first and prefetches the codes
/// and scales of the strip below it.
fn transposed_strip(
    level: Level,
    tile: &Tile<'_>,
    to: Float,
    out: &mut [u8],
    out_stride: usize,
    non_temporal: Option<&NonTemporalStores>,
    KernelScratch { tables, codes, floats }: &mut KernelScratch,
) {
    let (rows, cols, width) = (tile.rows, tile.cols, to.bytes());
    let (codes, floats) = (&mut codes.0, &mut floats.0);
    let row_bytes = tile.code.row_bytes(cols);
    let stride = row_bytes + ROW_PAD_BYTES;
    level.copy_and_prefetch(tile.bytes, tile.stride, rows, row_bytes, codes, stride);
    let scales = tile.scales();
    prefetch_scales(level, &scales, rows, cols);
    let tile = Tile { bytes: codes, stride, ..*tile };
    if let DecodeMethod::ByteTable(to) = DecodeMethod::of(&tile, to) {
        return look_up_fp8(level, &tile, to, out, out_stride, non_temporal, &mut tables[0]);
    }
    if let DecodeMethod::NibbleTable(to, values) = DecodeMethod::of(&tile, to)
        && level.has_fast_nibble_columns()
        && scales.block[1].is_multiple_of(32)
    {
        // 32 columns, 8 KiB, at a time: the decoded strip as a whole would not stay in the L1
        // cache.
        let (cache_lines, _) = floats.as_chunks_mut::<64>();
        for run in scales.col_runs(cols) {
            for col in (0..run.len).step_by(32) {
                let run = ScaleRun { start: run.start + col, len: 32.min(run.len - col), ..run };
                level.look_up_nibble_column(values, to, &tile, run, cache_lines);
                let (floats, out) =
                    (cache_lines.as_flattened(), &mut out[run.start * out_stride..]);
                level.transpose::<2>(floats, 64, rows, run.len, out, out_stride, non_temporal);
            }
        }
        return;
    }
    let stride = cols * width + ROW_PAD_BYTES;
    let mut output = RowOutput::Memory { out: &mut *floats, stride };
    RowDecoder { level, to, tables }.decode(&tile, &mut output);
    match to {
        Float::BF16 | Float::F16 => {
            level.transpose::<2>(floats, stride, rows, cols, out, out_stride, non_temporal);
        }
        Float::F32 => {
            level.transpose::<4>(floats, stride, rows, cols, out, out_stride, non_temporal);
        }
    }
}

/// Prefetches the scales of the `rows` rows below the tile, if each scale covers few rows.
fn prefetch_scales(level: Level, scales: &Scales<'_>, rows: usize, cols: usize) {
    if scales.block[0] >= SCALE_PREFETCH_MAX_BLOCK_ROWS {
        return;
    }
    let [row, col] = [scales.phase[0] + rows, scales.phase[1]];
    let below = row / scales.block[0] * scales.stride + col / scales.block[1];
    let below = scales.values.get(below..).unwrap_or(&[]);
    let (rows, cols) = (rows.div_ceil(scales.block[0]), cols.div_ceil(scales.block[1]));
    let (rows, cols) = if scales.stride == cols { (1, rows * cols) } else { (rows, cols) };
    level.prefetch(below, scales.stride, rows, cols);
}

/// Decodes a strip of FP8 codes by a table for each scale block, and transposes it.
fn look_up_fp8(
    level: Level,
    tile: &Tile<'_>,
    to: Half,
    out: &mut [u8],
    out_stride: usize,
    non_temporal: Option<&NonTemporalStores>,
    table: &mut Fp8Table,
) {
    let (scales, stride) = (tile.scales(), tile.stride);
    for rows in scales.row_runs(tile.rows) {
        let row_scales = &scales.values[rows.index * scales.stride..];
        for cols in scales.col_runs(tile.cols) {
            level.fill_table(to, row_scales[cols.index], table);
            let codes = &tile.bytes[rows.start * stride + cols.start..];
            let (len, out) = (rows.len, &mut out[cols.start * out_stride + 2 * rows.start..]);
            let write = |col, wide, out: &mut [u8], pitch| {
                level.look_up_transposed(table, &codes[col..], stride, len, wide, out, pitch);
            };
            level.write_rows(cols.len, 2 * len, out, out_stride, non_temporal, write);
        }
    }
}
