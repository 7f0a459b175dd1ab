//! AVX2 and F16C: vectors of 32 bytes, look-ups among 16 of them.

use std::arch::x86_64::*;

use super::super::float::Half;
use super::super::fp8::{self, Table};
use super::super::tile::{Run, Split};
use super::super::{Code, Scales, encode, rows};
use super::holds;
use crate::tensor::Float;

/// Loads 16 bytes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn load16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the array has 16 bytes; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

/// Stores 16 bytes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn store16(bytes: &mut [u8; 16], vector: __m128i) {
    // SAFETY: the array has 16 bytes; the store needs no alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), vector) }
}

/// Loads 32 bytes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the array has 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Stores 32 bytes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn store(bytes: &mut [u8; 32], vector: __m256i) {
    // SAFETY: the array has 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), vector) }
}

/// The table of one FP8 scale: low bytes of the results of codes 0 to 127, then high bytes, each
/// row of sixteen but the first as its difference (exclusive or) from the row before.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn table(to: Half, scale: f32, table: &mut Table) {
    fp8::planes(to, scale, table);
    let rows = table.0.as_flattened_mut().as_chunks_mut::<16>().0;
    for plane in rows[..16].chunks_exact_mut(8) {
        for row in (1..8).rev() {
            let before = load16(&plane[row - 1]);
            let difference = _mm_xor_si128(load16(&plane[row]), before);
            store16(&mut plane[row], difference);
        }
    }
}

/// FP8 codes to 16-bit floats: `vpshufb` looks the low four bits up in every row of the table up to
/// that of the code, and the differences add up to the row of the code.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn look_up(table: &Table, codes: &[u8], out: &mut [u8]) {
    let (rows, _) = table.0.as_flattened().as_chunks::<16>();
    let rows: &[[u8; 16]; 16] = rows[..16].try_into().expect("sixteen rows");
    let sign = _mm256_set1_epi8(i8::MIN);
    let results = |codes| {
        // Unpacking works in lanes of 16 bytes: codes 8k.. and 16 + 8k.. go to lane k first.
        let codes = _mm256_permute4x64_epi64::<0b11_01_10_00>(codes);
        let mut index = _mm256_andnot_si256(sign, codes);
        let row = |i: usize, index| {
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load16(&rows[i])), index)
        };
        let (mut low, mut high) = (row(0, index), row(8, index));
        for i in 1..8 {
            // A negative index, beyond the row of the code, looks up 0.
            index = _mm256_sub_epi8(index, _mm256_set1_epi8(16));
            low = _mm256_xor_si256(low, row(i, index));
            high = _mm256_xor_si256(high, row(8 + i, index));
        }
        high = _mm256_xor_si256(high, _mm256_and_si256(codes, sign));
        [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)]
    };
    let (whole, tail) = codes.as_chunks::<32>();
    let (out, out_tail) = out.as_chunks_mut::<64>();
    for (codes, out) in whole.iter().zip(out) {
        let [first, second] = results(load(codes));
        let (out, _) = out.as_chunks_mut::<32>();
        store(&mut out[0], first);
        store(&mut out[1], second);
    }
    if !tail.is_empty() {
        let mut padded = [0; 32];
        padded[..tail.len()].copy_from_slice(tail);
        let mut both = [[0; 32]; 2];
        let [first, second] = results(load(&padded));
        store(&mut both[0], first);
        store(&mut both[1], second);
        out_tail.copy_from_slice(&both.as_flattened()[..out_tail.len()]);
    }
}

/// A row of nibbles to 16-bit floats: the low and the high bytes of the sixteen results of a scale
/// fill a register each.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn nibbles(
    values: &[f32; 16],
    to: Half,
    codes: &[u8],
    runs: &Split,
    scales: &[f32],
    out: &mut [u8],
) {
    match to {
        Half::BF16 => nibbles_to::<false>(values, codes, runs, scales, out),
        Half::F16 => nibbles_to::<true>(values, codes, runs, scales, out),
    }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn nibbles_to<const F16: bool>(
    values: &[f32; 16],
    codes: &[u8],
    runs: &Split,
    scales: &[f32],
    out: &mut [u8],
) {
    let Split { block, head, body, tail, .. } = *runs;
    nibbles_of::<F16>(values, codes, head, scales, out);
    if block.is_multiple_of(32) && body.len > 0 {
        let codes = codes[body.start / 2..][..body.len / 2].chunks_exact(block / 2);
        let out = out[2 * body.start..][..2 * body.len].chunks_exact_mut(2 * block);
        let scales = &scales[body.index..][..body.len / block];
        for ((codes, out), &scale) in codes.zip(out).zip(scales) {
            let table = sixteen::<F16>(values, scale);
            let (codes, out) = (codes.as_chunks::<16>().0, out.as_chunks_mut::<64>().0);
            for (codes, out) in codes.iter().zip(out) {
                thirty_two(table, load16(codes), out);
            }
        }
    } else {
        for at in (0..body.len).step_by(block) {
            let (start, index) = (body.start + at, body.index + at / block);
            nibbles_of::<F16>(values, codes, Run { start, len: block, index }, scales, out);
        }
    }
    nibbles_of::<F16>(values, codes, tail, scales, out);
}

/// One run of nibbles, of any length.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn nibbles_of<const F16: bool>(
    values: &[f32; 16],
    codes: &[u8],
    run: Run,
    scales: &[f32],
    out: &mut [u8],
) {
    if run.len == 0 {
        return;
    }
    let table = sixteen::<F16>(values, scales[run.index]);
    let codes = codes[run.start / 2..][..run.len.div_ceil(2)].chunks(16);
    for (codes, out) in codes.zip(out[2 * run.start..][..2 * run.len].chunks_mut(64)) {
        let mut padded = [0; 16];
        padded[..codes.len()].copy_from_slice(codes);
        let mut result = [0; 64];
        thirty_two(table, load16(&padded), &mut result);
        out.copy_from_slice(&result[..out.len()]);
    }
}

/// Results of 32 nibbles, by the low and high bytes of a table of sixteen.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn thirty_two([low, high]: [__m128i; 2], codes: __m128i, out: &mut [u8; 64]) {
    let mask = _mm_set1_epi8(15);
    let even = _mm_and_si128(codes, mask);
    let odd = _mm_and_si128(_mm_srli_epi16::<4>(codes), mask);
    let (out, _) = out.as_chunks_mut::<16>();
    for (i, codes) in
        [_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)].into_iter().enumerate()
    {
        let (low, high) = (_mm_shuffle_epi8(low, codes), _mm_shuffle_epi8(high, codes));
        store16(&mut out[2 * i], _mm_unpacklo_epi8(low, high));
        store16(&mut out[2 * i + 1], _mm_unpackhi_epi8(low, high));
    }
}

/// Low and high bytes of sixteen `round(value * scale)`, BF16 or F16.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn sixteen<const F16: bool>(values: &[f32; 16], scale: f32) -> [__m128i; 2] {
    // The rounding below must not see a NaN whose payload it would carry into the sign. The one
    // that infinity times zero makes is harmless.
    let scale = if scale.is_nan() { f32::NAN } else { scale };
    // SAFETY: the array has 64 bytes; the loads need no alignment.
    let [first, second] =
        unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))] };
    let scale = _mm256_set1_ps(scale);
    let [first, second] = [_mm256_mul_ps(first, scale), _mm256_mul_ps(second, scale)];
    let results = if F16 {
        _mm256_set_m128i(
            _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(second),
            _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(first),
        )
    } else {
        // Packing works in lanes of 16 bytes, hence the order.
        let pairs = _mm256_packus_epi32(bf16_bits(first), bf16_bits(second));
        _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs)
    };
    let low = _mm256_and_si256(results, _mm256_set1_epi16(0xff));
    let high = _mm256_srli_epi16::<8>(results);
    let planes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(low, high));
    [_mm256_castsi256_si128(planes), _mm256_extracti128_si256::<1>(planes)]
}

/// Bits of the nearest BF16, ties to even, in 32 bits each; no NaN with a full payload.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn bf16_bits(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd);
    _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half))
}

/// Transposes whole tiles, 16 rows by 8 columns (2 bytes) or 8 by 4 (4 bytes), and gives the rows
/// and columns that are done.
///
/// Lane k of vector i holds 16 bytes of row `i + k * lanes`: the loads do what a transpose of the
/// full square would need one more round of shuffles for.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn transpose<const W: usize>(
    src: &[u8],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) -> (usize, usize) {
    assert!(holds(src, rows, stride, cols * W) && holds(out, cols, out_stride, rows * W));
    if W != 2 && W != 4 {
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
                if W == 2 {
                    tile16(src, stride, out, out_stride);
                } else {
                    tile32(src, stride, out, out_stride);
                }
            }
        }
    }
    (high, wide)
}

/// 16 bytes of each of the rows 0 and `step`.
///
/// # Safety
/// The rows are readable.
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn gather(src: *const u8, stride: usize, step: usize) -> __m256i {
    // SAFETY: the caller's promise; the loads need no alignment.
    unsafe { _mm256_loadu2_m128i(src.add(step * stride).cast(), src.cast()) }
}

/// Transposes 16 rows by 8 columns of 2 bytes.
///
/// # Safety
/// 16 rows of 16 bytes are readable at `src`, 8 of 32 bytes writable at `out`.
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn tile16(src: *const u8, stride: usize, out: *mut u8, out_stride: usize) {
    let [mut a, mut b, mut c] = [[_mm256_setzero_si256(); 8]; 3];
    for (i, a) in a.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *a = unsafe { gather(src.add(i * stride), stride, 8) };
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
unsafe fn tile32(src: *const u8, stride: usize, out: *mut u8, out_stride: usize) {
    let mut a = [_mm256_setzero_si256(); 4];
    for (i, a) in a.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *a = unsafe { gather(src.add(i * stride), stride, 4) };
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

/// [`rows::direct`] with these vectors.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn direct(
    code: Code,
    codes: &[u8],
    to: Float,
    scales: &Scales<'_>,
    row_scales: &[f32],
    out: &mut [u8],
) {
    rows::direct(code, codes, to, scales, row_scales, out);
}

/// [`encode::encode_row`] with these vectors.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn encode_row(
    code: Code,
    values: &[f32],
    scales: &Scales<'_>,
    row_scales: &[f32],
    out: &mut [u8],
) {
    encode::encode_row(code, values, scales, row_scales, out);
}

/// Asks for the cache lines of `items`.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn prefetch<T>(items: &[T]) {
    let per_line = 64 / size_of::<T>();
    for item in items.iter().step_by(per_line).chain(items.last()) {
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(item).cast());
    }
}

/// Copies `rows` runs of `width` bytes, past the caches where they fill whole cache lines.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn stream(
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
            // SAFETY: `out` has 64 bytes and starts a cache line; a fence comes before any
            // other thread's access, because the caller holds a `Stream`.
            unsafe {
                _mm256_stream_si256(out, load(&line[0]));
                _mm256_stream_si256(out.add(1), load(&line[1]));
            }
        }
        tail_out.copy_from_slice(tail_src);
    }
}

/// Waits until everything that was streamed is in memory.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn fence() {
    _mm_sfence();
}
