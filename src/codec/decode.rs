//! Decoding of tiles, straight or transposed.
//!
//! A transposed tile is decoded strip by strip into a block that stays in the cache, and transposed
//! from there: so there is one way to decode a row, and one way to transpose.

use super::rows::{Rows, Target};
use super::scratch::{self, PAD, STRIP_COLS, STRIP_ROW_BYTES, Scratch};
use super::tile::Scales;
use super::{Level, Orientation, Tile, copy2d_at};
use crate::tensor::Float;

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
    let mut rows = Rows { level, to, ahead: 0, tables: &mut scratch.tables };
    let mut target = match level.stream(Orientation::Straight, tile.rows * tile.cols * to.bytes()) {
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
    let stride = STRIP_COLS * width + PAD;
    let stream = level.stream(Orientation::Transposed, tile.rows * tile.cols * width);
    let scales = tile.scales.unwrap_or(Scales::ONE);
    // Strips end where scale blocks of 128 end, whatever the phase, but nibbles start at even
    // columns.
    let phase = if tile.code.bits() < 8 { scales.phase[1] & !1 } else { scales.phase[1] };
    let mut rows = Rows { level, to, ahead: strip_rows, tables: &mut scratch.tables };
    let block = &mut scratch.block.0;
    let mut col = 0;
    while col < tile.cols {
        let wide = (STRIP_COLS - (col + phase) % STRIP_COLS).min(tile.cols - col);
        let mut row = 0;
        while row < tile.rows {
            let high = strip_rows - (row + scales.phase[0]) % strip_rows;
            let high = high.min(tile.rows - row);
            let mut target = Target::Memory { out: &mut *block, stride };
            rows.decode(&tile.cut(row, high, col, wide), &mut target);
            let out = &mut out[col * out_stride + row * width..];
            let stream = stream.as_ref();
            match to {
                Float::BF16 | Float::F16 => {
                    level.transpose::<2>(block, stride, high, wide, out, out_stride, stream);
                }
                Float::F32 => {
                    level.transpose::<4>(block, stride, high, wide, out, out_stride, stream);
                }
            }
            row += high;
        }
        col += wide;
    }
}
