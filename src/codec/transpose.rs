//! Copies and transposes of 2-D arrays of 1, 2, 4 or 8 byte elements, without arithmetic.
//!
//! A transpose works on strips: a strip is copied into the cache with padded rows, and squares of
//! it are transposed in registers. [`transpose_in_l1`] is the portable version of the last step.

use super::scratch::{self, ROW_PAD_BYTES, STRIP_COLS, STRIP_OUT_ROW_BYTES};
use super::{Level, Orientation};

/// Copies `rows` by `cols` elements of `width` bytes (1, 2, 4 or 8), straight or transposed.
///
/// Element `(r, c)`, at `src[r * src_stride + c * width]`, goes to `(r, c)` (straight) or `(c, r)`
/// (transposed) of the output, whose rows lie `out_stride` bytes apart; `out_stride` is at least
/// the width of an output row. All other bytes of `out` keep their contents.
///
/// # Panics
/// If `src` or `out` is too short for the box, or a transpose has another `width`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn copy2d(
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

/// Does what `copy2d` does with the kernels of a given level.
///
/// # Panics
/// As `copy2d`.
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
        (Orientation::Straight, _) => {
            copy_rows(src, src_stride, rows, cols * width, out, out_stride)
        }
        (Orientation::Transposed, 1) => {
            transpose_strips::<1>(level, src, src_stride, rows, cols, out, out_stride)
        }
        (Orientation::Transposed, 2) => {
            transpose_strips::<2>(level, src, src_stride, rows, cols, out, out_stride)
        }
        (Orientation::Transposed, 4) => {
            transpose_strips::<4>(level, src, src_stride, rows, cols, out, out_stride)
        }
        (Orientation::Transposed, 8) => {
            transpose_strips::<8>(level, src, src_stride, rows, cols, out, out_stride)
        }
        (Orientation::Transposed, _) => panic!("no transpose of {width}-byte elements"),
    }
}

/// Copies `rows` rows of `width` bytes.
pub(super) fn copy_rows(
    src: &[u8],
    stride: usize,
    rows: usize,
    width: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    if stride == width && out_stride == width {
        out[..rows * width].copy_from_slice(&src[..rows * width]);
        return;
    }
    for row in 0..rows {
        out[row * out_stride..][..width].copy_from_slice(&src[row * stride..][..width]);
    }
}

/// Transposes strip by strip; each strip is copied into the cache first.
fn transpose_strips<const W: usize>(
    level: Level,
    src: &[u8],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    let strip_rows = STRIP_OUT_ROW_BYTES / W;
    let pitch = STRIP_COLS * W + ROW_PAD_BYTES;
    let non_temporal = level.non_temporal_stores(cols * out_stride);
    scratch::with(|scratch| {
        let strip = &mut scratch.floats.0;
        for col in (0..cols).step_by(STRIP_COLS) {
            let wide = STRIP_COLS.min(cols - col);
            for row in (0..rows).step_by(strip_rows) {
                let high = strip_rows.min(rows - row);
                copy_rows(&src[row * stride + col * W..], stride, high, wide * W, strip, pitch);
                let (out, non_temporal) =
                    (&mut out[col * out_stride + row * W..], non_temporal.as_ref());
                level.transpose::<W>(strip, pitch, high, wide, out, out_stride, non_temporal);
            }
        }
    });
}

/// Transposes a box that lies in the L1 cache, in squares whose rows are 8-byte words.
pub(super) fn transpose_in_l1<const W: usize>(
    src: &[u8],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    match W {
        1 => transpose_squares::<1, 8>(src, stride, rows, cols, out, out_stride),
        2 => transpose_squares::<2, 4>(src, stride, rows, cols, out, out_stride),
        4 => transpose_squares::<4, 2>(src, stride, rows, cols, out, out_stride),
        _ => transpose_squares::<8, 1>(src, stride, rows, cols, out, out_stride),
    }
}

/// Transposes squares of `N` by `N` elements of `W` bytes, where `N * W` is 8, and the elements
/// beyond the last whole square one by one.
fn transpose_squares<const W: usize, const N: usize>(
    src: &[u8],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    let (whole_rows, whole_cols) = (rows - rows % N, cols - cols % N);
    for col in (0..whole_cols).step_by(N) {
        let mut src_rows = src[col * W..].chunks(stride);
        let mut out_rows = out[col * out_stride..].chunks_mut(out_stride.max(rows * W));
        let mut out_words: [_; N] = std::array::from_fn(|_| {
            let row = out_rows.next().expect("the output holds the box");
            row[..whole_rows * W].as_chunks_mut::<8>().0.iter_mut()
        });
        for _ in 0..whole_rows / N {
            let mut words: [u64; N] = std::array::from_fn(|_| {
                let word = src_rows.next().and_then(|row| row.first_chunk());
                u64::from_le_bytes(*word.expect("the source holds the box"))
            });
            transpose_words(&mut words);
            for (out, word) in out_words.iter_mut().zip(words) {
                *out.next().expect("as many words as squares") = word.to_le_bytes();
            }
        }
    }
    let mut move_element = |row: usize, col: usize| {
        let element = &src[row * stride + col * W..][..W];
        out[col * out_stride + row * W..][..W].copy_from_slice(element);
    };
    for col in 0..whole_cols {
        (whole_rows..rows).for_each(|row| move_element(row, col));
    }
    for col in whole_cols..cols {
        (0..rows).for_each(|row| move_element(row, col));
    }
}

/// Transposes a square of `N` words of `N` lanes each; lane 0 is in the lowest bits. Each round
/// swaps the two off-diagonal quarters of squares that are twice as large as those of the last
/// round.
#[inline(always)]
fn transpose_words<const N: usize>(words: &mut [u64; N]) {
    let mut span = 1;
    while span < N {
        let bits = 64 / N * span;
        // From the lowest bit up: `bits` ones, `bits` zeros, and so on. The ones cover the lanes of
        // `words[i + span]` that trade places with the higher lanes of `words[i]`.
        let low_lanes = u64::MAX / ((1 << bits) + 1);
        for i in (0..N).filter(|i| i & span == 0) {
            let swap = (words[i] >> bits ^ words[i + span]) & low_lanes;
            words[i] ^= swap << bits;
            words[i + span] ^= swap;
        }
        span *= 2;
    }
}
