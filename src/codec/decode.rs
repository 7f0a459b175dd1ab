//! Decoding of tiles, straight or transposed.
//!
//! A transposed tile is decoded strip by strip. The codes of a strip are copied into the cache,
//! where rows do not fall on each other's lines, decoded into a block there and transposed. FP8
//! codes that a table serves are transposed before they are looked up: half the bytes.

use super::float::Half;
use super::fp8::Table;
use super::rows::{Rows, Target, Way};
use super::scratch::{self, PAD, STRIP_BYTES, STRIP_COLS, STRIP_ROW_BYTES, Scratch};
use super::simd::Stream;
use super::tile::{Run, Scales};
use super::{Level, Orientation, Tile, copy2d_at};
use crate::tensor::Float;

/// Rows that share a scale below which the next scales are asked for ahead of time: they are a
/// stream of memory next to the codes.
const FEW_ROWS: usize = 8;

/// Decodes a tile into floats of type `to`.
///
/// Element `(r, c)` is written to row `r`, column `c` of the output (straight) or to row `c`,
/// column `r` (transposed); its first byte is `out[row * out_stride + col * to.bytes()]`. Other
/// bytes of `out` stay. The value is `round(f32(code) * f32(scale))`, rounded once; without scales
/// it is the number of the code, and floats of the same type keep their bits.
///
/// Fast where `out` and `out_stride` are multiples of 64 bytes. Large outputs are written past the
/// caches.
///
/// # Panics
/// Where the tile's bytes, its scales or `out` do not hold the box.
pub(crate) fn decode(
    tile: &Tile<'_>,
    to: Float,
    orientation: Orientation,
    out: &mut [u8],
    out_stride: usize,
) {
    decode_at(Level::best(), tile, to, orientation, out, out_stride);
}

/// [`decode`] with the kernels of one level.
///
/// # Panics
/// As [`decode`].
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
    scratch: &mut Scratch,
) {
    let mut rows = Rows { level, to, tables: &mut scratch.tables };
    let mut target = match level.stream(tile.rows * out_stride) {
        Some(stream) => {
            Target::Stream { stream, stage: &mut scratch.block.0, out, stride: out_stride }
        }
        None => Target::Memory { out, stride: out_stride },
    };
    rows.decode(tile, &mut target);
}

fn transposed(
    level: Level,
    tile: &Tile<'_>,
    to: Float,
    out: &mut [u8],
    out_stride: usize,
    scratch: &mut Scratch,
) {
    let width = to.bytes();
    let strip_rows = STRIP_ROW_BYTES / width;
    let strip_cols = STRIP_COLS.min(STRIP_BYTES * 8 / tile.code.bits() as usize);
    let stream = level.stream(tile.cols * out_stride);
    let scales = tile.scales();
    // Strips end where scale blocks of 128 end, whatever the phase, but nibbles start at even
    // columns.
    let phase = if tile.code.bits() < 8 { scales.phase[1] & !1 } else { scales.phase[1] };
    let mut col = 0;
    while col < tile.cols {
        let wide = (strip_cols - (col + phase) % strip_cols).min(tile.cols - col);
        let mut row = 0;
        while row < tile.rows {
            let high = strip_rows - (row + scales.phase[0]) % strip_rows;
            let high = high.min(tile.rows - row);
            let out = &mut out[col * out_stride + row * width..];
            let tile = tile.cut(row, high, col, wide);
            strip(level, &tile, to, out, out_stride, stream.as_ref(), scratch);
            row += high;
        }
        col += wide;
    }
}

/// Transposes a strip. Its codes are copied into the cache first, and those below are asked for.
fn strip(
    level: Level,
    tile: &Tile<'_>,
    to: Float,
    out: &mut [u8],
    out_stride: usize,
    stream: Option<&Stream>,
    Scratch { tables, codes, block }: &mut Scratch,
) {
    let (rows, cols, width) = (tile.rows, tile.cols, to.bytes());
    let (codes, block) = (&mut codes.0, &mut block.0);
    let row_bytes = tile.code.row_bytes(cols);
    let stride = row_bytes + PAD;
    level.fetch(tile.bytes, tile.stride, rows, row_bytes, codes, stride);
    let scales = tile.scales();
    ask_for_scales(level, &scales, rows, cols);
    let tile = Tile { bytes: codes, stride, ..*tile };
    if let Way::Tables(to) = Way::of(&tile, to) {
        return look_up(level, &tile, to, out, out_stride, stream, &mut tables[0]);
    }
    if let Way::Nibbles(to, values) = Way::of(&tile, to)
        && level.takes_nibble_columns()
        && scales.block[1].is_multiple_of(32)
    {
        // 8 KiB at a time: the rows of the whole strip would not stay in the L1 cache.
        let (lines, _) = block.as_chunks_mut::<64>();
        for run in scales.col_runs(cols) {
            for col in (0..run.len).step_by(32) {
                let part = Run { start: run.start + col, len: 32.min(run.len - col), ..run };
                level.nibble_column(values, to, &tile, part, lines);
                let (block, out) = (lines.as_flattened(), &mut out[part.start * out_stride..]);
                level.transpose::<2>(block, 64, rows, part.len, out, out_stride, stream);
            }
        }
        return;
    }
    let stride = cols * width + PAD;
    let mut target = Target::Memory { out: &mut *block, stride };
    Rows { level, to, tables }.decode(&tile, &mut target);
    match to {
        Float::BF16 | Float::F16 => {
            level.transpose::<2>(block, stride, rows, cols, out, out_stride, stream);
        }
        Float::F32 => {
            level.transpose::<4>(block, stride, rows, cols, out, out_stride, stream);
        }
    }
}

/// Tells the processor that the scales of as many rows below are read soon, where there are many.
fn ask_for_scales(level: Level, scales: &Scales<'_>, rows: usize, cols: usize) {
    if scales.block[0] >= FEW_ROWS {
        return;
    }
    let [row, col] = [scales.phase[0] + rows, scales.phase[1]];
    let below = row / scales.block[0] * scales.stride + col / scales.block[1];
    let below = scales.values.get(below..).unwrap_or(&[]);
    let (rows, cols) = (rows.div_ceil(scales.block[0]), cols.div_ceil(scales.block[1]));
    let (rows, cols) = if scales.stride == cols { (1, rows * cols) } else { (rows, cols) };
    level.prefetch(below, scales.stride, rows, cols);
}

/// Transposes a strip of FP8 codes, block of scales by block, and looks them up on the way.
fn look_up(
    level: Level,
    tile: &Tile<'_>,
    to: Half,
    out: &mut [u8],
    out_stride: usize,
    stream: Option<&Stream>,
    table: &mut Table,
) {
    let (scales, stride) = (tile.scales(), tile.stride);
    for rows in scales.row_runs(tile.rows) {
        let row_scales = &scales.values[rows.index * scales.stride..];
        for cols in scales.col_runs(tile.cols) {
            level.table(to, row_scales[cols.index], table);
            let codes = &tile.bytes[rows.start * stride + cols.start..];
            let (len, out) = (rows.len, &mut out[cols.start * out_stride + 2 * rows.start..]);
            level.lines(cols.len, 2 * len, out, out_stride, stream, |col, wide, out, pitch| {
                level.look_up_transposed(table, &codes[col..], stride, len, wide, out, pitch);
            });
        }
    }
}
