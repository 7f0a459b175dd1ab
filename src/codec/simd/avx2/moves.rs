//! AVX2 kernels that move bytes without arithmetic: transposes, non-temporal stores, prefetches.

use std::arch::x86_64::*;

use super::super::holds;
use super::load;

/// Transposes the whole tiles of a box and returns how many rows and columns that covers. A tile
/// has 32 rows by 16 columns (1 byte), 16 by 8 (2 bytes) or 8 by 4 (4 bytes).
///
/// The loads put rows that are half a tile apart into the two 16-byte lanes of a vector. That saves
/// the round of shuffles across lanes that a transpose of a full square needs.
#[target_feature(enable = "avx2,f16c")]
pub(in super::super) fn transpose<const W: usize>(
    src: &[u8],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) -> (usize, usize) {
    assert!(holds(src, rows, stride, cols, W) && holds(out, cols, out_stride, rows, W));
    if W > 4 {
        return (0, 0);
    }
    let (tile_rows, tile_cols) = (32 / W, 16 / W);
    let (high, wide) = (rows - rows % tile_rows, cols - cols % tile_cols);
    for col in (0..wide).step_by(tile_cols) {
        for row in (0..high).step_by(tile_rows) {
            // SAFETY: the tile lies in the box, and both slices were checked to hold the box.
            unsafe {
                let src = src.as_ptr().add(row * stride + col * W);
                let out = out.as_mut_ptr().add(col * out_stride + row * W);
                match W {
                    1 => transpose_tile_u8(src, stride, out, out_stride),
                    2 => transpose_tile_u16(src, stride, out, out_stride),
                    _ => transpose_tile_u32(src, stride, out, out_stride),
                }
            }
        }
    }
    (high, wide)
}

/// Loads 16 bytes of row 0 and 16 bytes of row `step` into the two lanes of a vector.
///
/// # Safety
/// Both must be readable at `src` with a row pitch of `stride`.
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn load_strided(src: *const u8, stride: usize, step: usize) -> __m256i {
    // SAFETY: the caller's promise; the loads need no alignment.
    unsafe { _mm256_loadu2_m128i(src.add(step * stride).cast(), src.cast()) }
}

/// Transposes 32 rows by 16 columns of 1 byte.
///
/// # Safety
/// 32 rows of 16 bytes are readable at `src`, 16 of 32 bytes writable at `out`.
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn transpose_tile_u8(src: *const u8, stride: usize, out: *mut u8, out_stride: usize) {
    let mut a = [_mm256_setzero_si256(); 16];
    for (i, a) in a.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *a = unsafe { load_strided(src.add(i * stride), stride, 16) };
    }
    // The index of a byte in `a` is 8 bits: row bits above column bits. A round of unpacking
    // rotates them by one bit, so four rounds swap row and column.
    for _ in 0..4 {
        let b = a;
        for i in 0..8 {
            a[2 * i] = _mm256_unpacklo_epi8(b[i], b[i + 8]);
            a[2 * i + 1] = _mm256_unpackhi_epi8(b[i], b[i + 8]);
        }
    }
    for (i, a) in a.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_si256(out.add(i * out_stride).cast(), a) };
    }
}

/// Transposes 16 rows by 8 columns of 2 bytes.
///
/// # Safety
/// 16 rows of 16 bytes are readable at `src`, 8 of 32 bytes writable at `out`.
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn transpose_tile_u16(src: *const u8, stride: usize, out: *mut u8, out_stride: usize) {
    let [mut a, mut b, mut c] = [[_mm256_setzero_si256(); 8]; 3];
    for (i, a) in a.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *a = unsafe { load_strided(src.add(i * stride), stride, 8) };
    }
    for i in [0, 2, 4, 6] {
        b[i] = _mm256_unpacklo_epi16(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 1]);
    }
    // Even vectors of b hold columns 0 to 3 of two rows, odd ones columns 4 to 7.
    for i in [0, 1, 4, 5] {
        let at = i + i % 2;
        c[at] = _mm256_unpacklo_epi32(b[i], b[i + 2]);
        c[at + 1] = _mm256_unpackhi_epi32(b[i], b[i + 2]);
    }
    for i in 0..8 {
        let (x, y) = (c[i / 2], c[i / 2 + 4]);
        let column =
            if i % 2 == 0 { _mm256_unpacklo_epi64(x, y) } else { _mm256_unpackhi_epi64(x, y) };
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_si256(out.add(i * out_stride).cast(), column) };
    }
}

/// Transposes 8 rows by 4 columns of 4 bytes.
///
/// # Safety
/// 8 rows of 16 bytes are readable at `src`, 4 of 32 bytes writable at `out`.
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn transpose_tile_u32(src: *const u8, stride: usize, out: *mut u8, out_stride: usize) {
    let mut a = [_mm256_setzero_si256(); 4];
    for (i, a) in a.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *a = unsafe { load_strided(src.add(i * stride), stride, 4) };
    }
    let b = [
        _mm256_unpacklo_epi32(a[0], a[1]),
        _mm256_unpackhi_epi32(a[0], a[1]),
        _mm256_unpacklo_epi32(a[2], a[3]),
        _mm256_unpackhi_epi32(a[2], a[3]),
    ];
    for i in 0..4 {
        let (x, y) = (b[i / 2], b[i / 2 + 2]);
        let column =
            if i % 2 == 0 { _mm256_unpacklo_epi64(x, y) } else { _mm256_unpackhi_epi64(x, y) };
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_si256(out.add(i * out_stride).cast(), column) };
    }
}

/// Prefetches the cache lines of `rows` rows of `cols` values. The addresses need not be valid.
#[target_feature(enable = "avx2,f16c")]
pub(in super::super) fn prefetch(items: &[f32], stride: usize, rows: usize, cols: usize) {
    for row in 0..rows {
        let run = items.as_ptr().wrapping_add(row * stride);
        for at in (0..cols).step_by(16).chain([cols - 1]) {
            _mm_prefetch::<_MM_HINT_T0>(run.wrapping_add(at).cast());
        }
    }
}

/// Copies `rows` rows of `width` bytes and prefetches as many rows below them.
#[target_feature(enable = "avx2,f16c")]
pub(in super::super) fn copy_and_prefetch(
    src: &[u8],
    stride: usize,
    rows: usize,
    width: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    for row in 0..rows {
        let (src, out) = (&src[row * stride..][..width], &mut out[row * out_stride..][..width]);
        // A prefetch needs no valid address.
        let below = src.as_ptr().wrapping_add(rows * stride);
        for line in (0..width).step_by(64) {
            _mm_prefetch::<_MM_HINT_T0>(below.wrapping_add(line).cast());
        }
        out.copy_from_slice(src);
    }
}

/// Copies `rows` rows of `width` bytes; whole cache lines of the output are written with
/// non-temporal stores.
#[target_feature(enable = "avx2,f16c")]
pub(in super::super) fn copy_non_temporal(
    src: &[u8],
    stride: usize,
    rows: usize,
    width: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    for row in 0..rows {
        let (src, out) = (&src[row * stride..][..width], &mut out[row * out_stride..][..width]);
        let head = out.as_ptr().align_offset(64).min(width);
        let ((head_src, src), (head_out, out)) = (src.split_at(head), out.split_at_mut(head));
        let ((lines, tail_src), (out_lines, tail_out)) =
            (src.as_chunks::<64>(), out.as_chunks_mut::<64>());
        head_out.copy_from_slice(head_src);
        for (line, out) in lines.iter().zip(out_lines) {
            let (line, _) = line.as_chunks::<32>();
            let out: *mut __m256i = out.as_mut_ptr().cast();
            // SAFETY: `out` has 64 bytes and is aligned to 64. The caller holds a
            // `NonTemporalStores`, whose drop executes a fence before another thread can read.
            unsafe {
                _mm256_stream_si256(out, load(&line[0]));
                _mm256_stream_si256(out.add(1), load(&line[1]));
            }
        }
        tail_out.copy_from_slice(tail_src);
    }
}

/// Store fence: orders all non-temporal stores before any later store.
#[target_feature(enable = "avx2,f16c")]
pub(in super::super) fn fence() {
    _mm_sfence();
}
