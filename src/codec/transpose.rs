//! 2-D byte moves, straight or transposed, without arithmetic.

use super::{Level, Orientation};

/// Elements along each side of the block that is transposed at a time.
const SIDE: usize = 64;

/// Bytes between the rows of a cached block beyond their own: a row pitch that is a power of two
/// would map a whole column to one set of the L1 cache.
pub(super) const PAD: usize = 64;

/// Moves `rows` by `cols` elements of `width` bytes (1, 2, 4 or 8).
///
/// Element `(r, c)`, at `src[r * src_stride + c * width]`, goes to `(r, c)` (straight) or `(c, r)`
/// (transposed) of the output, whose rows lie `out_stride` bytes apart. Other bytes of `out` stay.
///
/// # Panics
/// Where `src` or `out` does not hold the box, or `width` is none of the four.
#[allow(clippy::too_many_arguments)]
pub fn copy2d(
    width: usize,
    src: &[u8],
    src_stride: usize,
    rows: usize,
    cols: usize,
    orientation: Orientation,
    out: &mut [u8],
    out_stride: usize,
) {
    copy2d_at(Level::best(), width, src, src_stride, rows, cols, orientation, out, out_stride);
}

/// [`copy2d`] with the kernels of one level.
///
/// # Panics
/// As [`copy2d`].
#[allow(clippy::too_many_arguments)]
pub fn copy2d_at(
    level: Level,
    width: usize,
    src: &[u8],
    src_stride: usize,
    rows: usize,
    cols: usize,
    orientation: Orientation,
    out: &mut [u8],
    out_stride: usize,
) {
    if rows == 0 || cols == 0 {
        return;
    }
    match (orientation, width) {
        (Orientation::Straight, _) => copy(src, src_stride, rows, cols * width, out, out_stride),
        (Orientation::Transposed, 1) => blocks::<1>(src, src_stride, rows, cols, out, out_stride),
        (Orientation::Transposed, 2) => blocks::<2>(src, src_stride, rows, cols, out, out_stride),
        (Orientation::Transposed, 4) => blocks::<4>(src, src_stride, rows, cols, out, out_stride),
        (Orientation::Transposed, 8) => blocks::<8>(src, src_stride, rows, cols, out, out_stride),
        (Orientation::Transposed, _) => panic!("no transpose of {width}-byte elements"),
    }
    let _ = level;
}

/// Moves `rows` runs of `width` bytes.
fn copy(src: &[u8], stride: usize, rows: usize, width: usize, out: &mut [u8], out_stride: usize) {
    if stride == width && out_stride == width {
        out[..rows * width].copy_from_slice(&src[..rows * width]);
        return;
    }
    for row in 0..rows {
        out[row * out_stride..][..width].copy_from_slice(&src[row * stride..][..width]);
    }
}

/// Transposes by way of blocks that are copied into the L1 cache first.
fn blocks<const W: usize>(
    src: &[u8],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    let pitch = SIDE * W + PAD;
    let mut block = [0; SIDE * (SIDE * 8 + PAD)];
    for col in (0..cols).step_by(SIDE) {
        let wide = SIDE.min(cols - col);
        for row in (0..rows).step_by(SIDE) {
            let high = SIDE.min(rows - row);
            copy(&src[row * stride + col * W..], stride, high, wide * W, &mut block, pitch);
            let out = &mut out[col * out_stride + row * W..];
            cached::<W>(&block, pitch, high, wide, out, out_stride);
        }
    }
}

/// Transposes what lies in the L1 cache, one row of the output after the other.
fn cached<const W: usize>(
    src: &[u8],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    for col in 0..cols {
        let out = out[col * out_stride..][..rows * W].as_chunks_mut::<W>().0;
        for (out, row) in out.iter_mut().zip(src.chunks(stride)) {
            out.copy_from_slice(&row[col * W..][..W]);
        }
    }
}

/// Transposes decoded elements of 2 or 4 bytes from a block that lies in the L1 cache.
#[allow(clippy::too_many_arguments)]
pub(super) fn from_block(
    level: Level,
    width: usize,
    block: &[u8],
    pitch: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    let _ = level;
    match width {
        2 => cached::<2>(block, pitch, rows, cols, out, out_stride),
        _ => cached::<4>(block, pitch, rows, cols, out, out_stride),
    }
}
