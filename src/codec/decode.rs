//! Decoding of tiles: the way from codes and scales to rows of floats.
//!
//! A transposed tile is decoded strip by strip into a block that stays in the L1 cache, and
//! transposed from there: so there is one way to decode a row, and one way to transpose.

use super::float::{self, Half};
use super::fp8;
use super::nibble::Nibble;
use super::tile::{Run, Scales};
use super::transpose::{self, PAD};
use super::{Code, Level, Orientation, Tile, copy2d_at};
use crate::tensor::Float;

/// Decodes a tile into floats of type `to`.
///
/// Element `(r, c)` is written to row `r`, column `c` of the output (straight) or to row `c`,
/// column `r` (transposed); its first byte is `out[row * out_stride + col * to.bytes()]`. Other
/// bytes of `out` stay. The value is `round(f32(code) * f32(scale))`, rounded once; without scales it
/// is the number of the code, and floats of the same type keep their bits.
///
/// # Panics
/// Where the tile's bytes, its scales or `out` do not hold the box.
pub fn decode(
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
    let mut tables = [[0; 256]; TABLES];
    match orientation {
        Orientation::Straight => straight(level, tile, to, out, out_stride, &mut tables),
        Orientation::Transposed => transposed(level, tile, to, out, out_stride, &mut tables),
    }
}

/// Look-up tables that are in use at a time, one for each FP8 scale: 16 KiB of L1 cache.
const TABLES: usize = 32;

/// Elements that a look-up table must serve to pay for its 256 entries.
const WORTH_A_TABLE: usize = 512;

/// Columns of a strip that is transposed at a time.
const STRIP_COLS: usize = 128;

/// Bytes of a decoded strip: 128 rows of 2-byte elements or 64 of 4-byte ones, with their padding.
const STRIP_BYTES: usize = 128 * (STRIP_COLS * 2 + PAD);

fn transposed(
    level: Level,
    tile: &Tile<'_>,
    to: Float,
    out: &mut [u8],
    out_stride: usize,
    tables: &mut [[u16; 256]; TABLES],
) {
    let width = to.bytes();
    let strip_rows = 256 / width;
    let pitch = STRIP_COLS * width + PAD;
    let mut block = [0; STRIP_BYTES];
    let scales = tile.scales.unwrap_or(Scales::ONE);
    // Strips end where scale blocks of 128 end, whatever the phase, but nibbles start at even columns.
    let phase = if tile.code.bits() < 8 { scales.phase[1] & !1 } else { scales.phase[1] };
    let mut col = 0;
    while col < tile.cols {
        let wide = (STRIP_COLS - (col + phase) % STRIP_COLS).min(tile.cols - col);
        let mut row = 0;
        while row < tile.rows {
            let high = strip_rows - (row + scales.phase[0]) % strip_rows;
            let high = high.min(tile.rows - row);
            straight(level, &tile.cut(row, high, col, wide), to, &mut block, pitch, tables);
            let out = &mut out[col * out_stride + row * width..];
            transpose::from_block(level, width, &block, pitch, high, wide, out, out_stride);
            row += high;
        }
        col += wide;
    }
}

fn straight(
    level: Level,
    tile: &Tile<'_>,
    to: Float,
    out: &mut [u8],
    out_stride: usize,
    tables: &mut [[u16; 256]; TABLES],
) {
    let scales = tile.scales.unwrap_or(Scales::ONE);
    for run in scales.row_runs(tile.rows) {
        let first = run.index * scales.stride;
        let rows = tile.cut(run.start, run.len, 0, tile.cols);
        let out = &mut out[run.start * out_stride..];
        let row_scales = &scales.values[first..];
        let served = run.len * scales.block[1].min(tile.cols);
        match (tile.code, Half::of(to)) {
            (Code::E4M3, Some(to)) if served >= WORTH_A_TABLE => {
                look_up(level, &rows, to, &scales, row_scales, out, out_stride, tables);
            }
            _ => direct(&rows, to, &scales, row_scales, out, out_stride),
        }
    }
}

/// FP8 to 16 bits by a table for each scale of one row of scales.
#[allow(clippy::too_many_arguments)]
fn look_up(
    level: Level,
    tile: &Tile<'_>,
    to: Half,
    scales: &Scales<'_>,
    row_scales: &[f32],
    out: &mut [u8],
    out_stride: usize,
    tables: &mut [[u16; 256]; TABLES],
) {
    let _ = level;
    let mut runs = scales.col_runs(tile.cols).peekable();
    while runs.peek().is_some() {
        let mut band = [Run { start: 0, len: 0, index: 0 }; TABLES];
        let mut used = 0;
        for (slot, run) in band.iter_mut().zip(runs.by_ref()) {
            tables[used] = fp8::table(to, row_scales[run.index]);
            *slot = run;
            used += 1;
        }
        for row in 0..tile.rows {
            let (codes, out) = (tile.row(row), &mut out[row * out_stride..]);
            for (run, table) in band[..used].iter().zip(&*tables) {
                let out = &mut out[2 * run.start..][..2 * run.len];
                let out = out.as_chunks_mut::<2>().0.iter_mut();
                for (out, &code) in out.zip(&codes[run.start..]) {
                    *out = table[usize::from(code)].to_le_bytes();
                }
            }
        }
    }
}

/// Numbers that are in flight between unpacking, scaling and rounding: 1 KiB.
const LANES: usize = 256;

/// Any code to any float, by arithmetic.
fn direct(
    tile: &Tile<'_>,
    to: Float,
    scales: &Scales<'_>,
    row_scales: &[f32],
    out: &mut [u8],
    out_stride: usize,
) {
    let mut lanes = [0.0; LANES];
    for row in 0..tile.rows {
        let (codes, out) = (tile.row(row), &mut out[row * out_stride..]);
        for run in scales.col_runs(tile.cols) {
            let scale = row_scales[run.index];
            for at in (0..run.len).step_by(LANES) {
                let lanes = &mut lanes[..LANES.min(run.len - at)];
                let col = run.start + at;
                unpack(tile.code, codes, col, lanes);
                for x in lanes.iter_mut() {
                    *x *= scale;
                }
                float::store(to, lanes, &mut out[to.bytes() * col..][..to.bytes() * lanes.len()]);
            }
        }
    }
}

/// The numbers of columns `col..col + out.len()` of a row, unscaled.
fn unpack(code: Code, row: &[u8], col: usize, out: &mut [f32]) {
    match code {
        Code::E4M3 => fp8::unpack(&row[col..], out),
        Code::E2M1 => Nibble::E2M1.unpack(row, col, out),
        Code::Int4 => Nibble::Int4.unpack(row, col, out),
        Code::BF16 => float::load(Float::BF16, &row[2 * col..], out),
        Code::F16 => float::load(Float::F16, &row[2 * col..], out),
        Code::F32 => float::load(Float::F32, &row[4 * col..], out),
    }
}
