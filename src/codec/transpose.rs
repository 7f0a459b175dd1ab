//! 2-D byte moves, straight or transposed, without arithmetic.

use super::scratch::{self, PAD, STRIP_COLS, STRIP_ROW_BYTES};
use super::{Level, Orientation};

/// Moves `rows` by `cols` elements of `width` bytes (1, 2, 4 or 8).
///
/// Element `(r, c)`, at `src[r * src_stride + c * width]`, goes to `(r, c)` (straight) or `(c, r)`
/// (transposed) of the output, whose rows lie `out_stride` bytes apart, at least their own width.
/// Other bytes of `out` stay.
///
/// # Panics
/// Where `src` or `out` does not hold the box, or `width` is none of the four.
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
        (Orientation::Transposed, 1) => {
            strips::<1>(level, src, src_stride, rows, cols, out, out_stride)
        }
        (Orientation::Transposed, 2) => {
            strips::<2>(level, src, src_stride, rows, cols, out, out_stride)
        }
        (Orientation::Transposed, 4) => {
            strips::<4>(level, src, src_stride, rows, cols, out, out_stride)
        }
        (Orientation::Transposed, 8) => {
            strips::<8>(level, src, src_stride, rows, cols, out, out_stride)
        }
        (Orientation::Transposed, _) => panic!("no transpose of {width}-byte elements"),
    }
}

/// Moves `rows` runs of `width` bytes.
pub(super) fn copy(
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

/// Transposes by way of strips that are copied into the cache first.
fn strips<const W: usize>(
    level: Level,
    src: &[u8],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    let strip_rows = STRIP_ROW_BYTES / W;
    let pitch = STRIP_COLS * W + PAD;
    let stream = level.stream(cols * out_stride);
    scratch::with(|scratch| {
        let block = &mut scratch.block.0;
        for col in (0..cols).step_by(STRIP_COLS) {
            let wide = STRIP_COLS.min(cols - col);
            for row in (0..rows).step_by(strip_rows) {
                let high = strip_rows.min(rows - row);
                copy(&src[row * stride + col * W..], stride, high, wide * W, block, pitch);
                let out = &mut out[col * out_stride + row * W..];
                level.transpose::<W>(block, pitch, high, wide, out, out_stride, stream.as_ref());
            }
        }
    });
}

/// Transposes what lies in the L1 cache, in squares whose rows are machine words.
pub(super) fn cached<const W: usize>(
    src: &[u8],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    match W {
        1 => squares::<1, 8>(src, stride, rows, cols, out, out_stride),
        2 => squares::<2, 4>(src, stride, rows, cols, out, out_stride),
        4 => squares::<4, 2>(src, stride, rows, cols, out, out_stride),
        _ => squares::<8, 1>(src, stride, rows, cols, out, out_stride),
    }
}

/// Squares of `N` by `N` elements of `W` bytes, `N * W` being 8; element by element at the edges.
fn squares<const W: usize, const N: usize>(
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
    let mut one = |row: usize, col: usize| {
        let element = &src[row * stride + col * W..][..W];
        out[col * out_stride + row * W..][..W].copy_from_slice(element);
    };
    for col in 0..whole_cols {
        (whole_rows..rows).for_each(|row| one(row, col));
    }
    for col in whole_cols..cols {
        (0..rows).for_each(|row| one(row, col));
    }
}

/// Transposes a square of `N` words of `N` lanes, lane 0 lowest, by swapping ever larger quarters.
#[inline(always)]
fn transpose_words<const N: usize>(words: &mut [u64; N]) {
    let mut span = 1;
    while span < N {
        let bits = 64 / N * span;
        // `bits` ones, `bits` zeros, and so on upwards: the lanes that stay in the upper word.
        let stay = u64::MAX / ((1 << bits) + 1);
        for i in (0..N).filter(|i| i & span == 0) {
            let swap = (words[i] >> bits ^ words[i + span]) & stay;
            words[i] ^= swap << bits;
            words[i + span] ^= swap;
        }
        span *= 2;
    }
}
