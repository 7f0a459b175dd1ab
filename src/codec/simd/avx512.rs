//! Kernels for AVX-512 F, BW, VL, DQ and VBMI: vectors of 64 bytes, look-ups (`vpermi2b`) in tables
//! of 128 bytes.

use std::arch::x86_64::*;

use super::super::float::Half;
use super::super::fp8::{self, Fp8Table};
use super::super::tile::{ScaleRun, ScaleRuns, SplitRuns};
use super::super::{Code, Scales, Tile, encode, rows};
use super::{avx2, holds};
use crate::tensor::Float;

pub(super) use avx2::{copy_non_temporal, fence, prefetch};

/// Loads 64 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the array has 64 bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// Stores 64 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
fn store(bytes: &mut [u8; 64], vector: __m512i) {
    // SAFETY: the array has 64 bytes; the store needs no alignment.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), vector) }
}

/// Fills the table of one FP8 scale: the low bytes of the results of codes 0 to 127, then their
/// high bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) fn fill_table(to: Half, scale: f32, table: &mut Fp8Table) {
    fp8::fill_byte_planes(to, scale, table);
}

/// A table in four registers: two of low bytes, two of high bytes.
type BytePlanes = [__m512i; 4];

/// Loads a table into registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
fn load_byte_planes(table: &Fp8Table) -> BytePlanes {
    let planes = table.0.as_flattened().as_chunks::<64>().0;
    std::array::from_fn(|i| load(&planes[i]))
}

/// Decodes 64 FP8 codes by two look-ups in 128 bytes each. The first result holds the lower eight
/// codes of each 16-byte lane, the second the upper eight.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
fn results([low0, low1, high0, high1]: BytePlanes, codes: __m512i) -> [__m512i; 2] {
    // `vpermi2b` uses 7 bits of the code as the index; the eighth is the sign.
    let low = _mm512_permutex2var_epi8(low0, codes, low1);
    let high = _mm512_permutex2var_epi8(high0, codes, high1);
    // high ^ (codes & sign)
    let high = _mm512_ternarylogic_epi32::<0x78>(high, codes, _mm512_set1_epi8(i8::MIN));
    [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
}

/// Decodes FP8 codes into 16-bit floats.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) fn look_up(
    tables: &[Fp8Table],
    runs: &ScaleRuns,
    tile: &Tile<'_>,
    out: &mut [u8],
    out_stride: usize,
) {
    fp8::for_each_run(tables, runs, tile, out, out_stride, |table, codes, out| {
        look_up_run(load_byte_planes(table), codes, out);
    });
}

/// Decodes a run of codes by one table.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
fn look_up_run(planes: BytePlanes, codes: &[u8], out: &mut [u8]) {
    // Lane k gets the eight codes from 8k on and the eight from 32 + 8k on.
    let lanes = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    let results = |codes| results(planes, _mm512_permutexvar_epi64(lanes, codes));
    let (whole, tail) = codes.as_chunks::<64>();
    let (out, out_tail) = out.as_chunks_mut::<128>();
    for (codes, out) in whole.iter().zip(out) {
        let [first, second] = results(load(codes));
        let (out, _) = out.as_chunks_mut::<64>();
        store(&mut out[0], first);
        store(&mut out[1], second);
    }
    if !tail.is_empty() {
        let mut padded = [0; 64];
        padded[..tail.len()].copy_from_slice(tail);
        let mut both = [[0; 64]; 2];
        let [first, second] = results(load(&padded));
        store(&mut both[0], first);
        store(&mut both[1], second);
        out_tail.copy_from_slice(&both.as_flattened()[..out_tail.len()]);
    }
}

/// Decodes FP8 codes into 16-bit floats and transposes them. The codes are transposed, not the
/// floats: they are half as many bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) fn look_up_transposed(
    table: &Fp8Table,
    src: &[u8],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    assert!(holds(src, rows, stride, cols, 1) && holds(out, cols, out_stride, rows, 2));
    let planes = load_byte_planes(table);
    for col in (0..cols).step_by(16) {
        let wide = 16.min(cols - col);
        for row in (0..rows).step_by(64) {
            let high = 64.min(rows - row);
            let (src, out) = (&src[row * stride + col..], &mut out[col * out_stride + 2 * row..]);
            if high == 64 && wide == 16 {
                // SAFETY: the tile lies in the box, and both slices were checked to hold the box.
                unsafe {
                    look_up_tile_transposed(
                        planes,
                        src.as_ptr(),
                        stride,
                        out.as_mut_ptr(),
                        out_stride,
                    );
                }
                continue;
            }
            let (mut codes, mut floats) = ([[0; 16]; 64], [[0; 128]; 16]);
            for (i, codes) in codes[..high].iter_mut().enumerate() {
                codes[..wide].copy_from_slice(&src[i * stride..][..wide]);
            }
            // SAFETY: the arrays are a tile.
            unsafe {
                look_up_tile_transposed(
                    planes,
                    codes.as_ptr().cast(),
                    16,
                    floats.as_mut_ptr().cast(),
                    128,
                );
            }
            for (i, floats) in floats[..wide].iter().enumerate() {
                out[i * out_stride..][..2 * high].copy_from_slice(&floats[..2 * high]);
            }
        }
    }
}

/// Transposes and decodes 64 rows by 16 columns of codes.
///
/// # Safety
/// 64 rows of 16 bytes are readable at `src`, 16 of 128 bytes writable at `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
unsafe fn look_up_tile_transposed(
    planes: BytePlanes,
    src: *const u8,
    stride: usize,
    out: *mut u8,
    out_stride: usize,
) {
    // Lane k gets the eight rows from 8k on and the eight from 32 + 8k on: the order in which
    // `results` returns its codes.
    let mut a = [_mm512_setzero_si512(); 16];
    for (i, a) in a.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *a = unsafe { load_strided(src.add((i + i / 8 * 24) * stride), stride, 8) };
    }
    for (i, codes) in transpose_lanes(a).into_iter().enumerate() {
        let [first, second] = results(planes, codes);
        // SAFETY: the caller's promise.
        unsafe {
            let out = out.add(i * out_stride);
            _mm512_storeu_si512(out.cast(), first);
            _mm512_storeu_si512(out.add(64).cast(), second);
        }
    }
}

/// Transposes squares of 16 by 16 bytes, one in each lane.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
fn transpose_lanes(mut a: [__m512i; 16]) -> [__m512i; 16] {
    // The index of a byte in `a` is 8 bits: row bits above column bits. A round of unpacking
    // rotates them by one bit, so four rounds swap row and column.
    for _ in 0..4 {
        let b = a;
        for i in 0..8 {
            a[2 * i] = _mm512_unpacklo_epi8(b[i], b[i + 8]);
            a[2 * i + 1] = _mm512_unpackhi_epi8(b[i], b[i + 8]);
        }
    }
    a
}

/// Decodes rows of 4-bit codes into 16-bit floats by a table of 16 results for each scale.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) fn look_up_nibbles(
    values: &[f32; 16],
    to: Half,
    tile: &Tile<'_>,
    runs: &SplitRuns,
    out: &mut [u8],
    out_stride: usize,
) {
    match to {
        Half::BF16 => rows::for_each_row(tile, 2, out, out_stride, |codes, scales, out| {
            look_up_nibble_row::<false>(values, codes, runs, scales, out);
        }),
        Half::F16 => rows::for_each_row(tile, 2, out, out_stride, |codes, scales, out| {
            look_up_nibble_row::<true>(values, codes, runs, scales, out);
        }),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
fn look_up_nibble_row<const F16: bool>(
    values: &[f32; 16],
    codes: &[u8],
    runs: &SplitRuns,
    scales: &[f32],
    out: &mut [u8],
) {
    // SAFETY: the array has 64 bytes; the load needs no alignment.
    let values = unsafe { _mm512_loadu_ps(values.as_ptr()) };
    let SplitRuns { block, blocks, head, body, tail, .. } = *runs;
    look_up_nibble_run::<F16>(values, codes, head, scales, out);
    if block.is_multiple_of(32) {
        let scales = &scales[body.index..][..blocks];
        for (i, &scale) in scales.iter().enumerate() {
            let table = nibble_table::<F16>(values, scale);
            let start = body.start + i * block;
            let (codes, _) = codes[start / 2..][..block / 2].as_chunks::<16>();
            let (out, _) = out[2 * start..][..2 * block].as_chunks_mut::<64>();
            for (codes, out) in codes.iter().zip(out) {
                store(out, look_up_32_nibbles(table, avx2::load16(codes)));
            }
        }
    } else {
        for at in (0..body.len).step_by(block) {
            let (start, index) = (body.start + at, body.index + at / block);
            look_up_nibble_run::<F16>(
                values,
                codes,
                ScaleRun { start, len: block, index },
                scales,
                out,
            );
        }
    }
    look_up_nibble_run::<F16>(values, codes, tail, scales, out);
}

/// Decodes one run of 4-bit codes, of any length.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
fn look_up_nibble_run<const F16: bool>(
    values: __m512,
    codes: &[u8],
    run: ScaleRun,
    scales: &[f32],
    out: &mut [u8],
) {
    if run.len == 0 {
        return;
    }
    let table = nibble_table::<F16>(values, scales[run.index]);
    let codes = codes[run.start / 2..][..run.len.div_ceil(2)].chunks(16);
    for (codes, out) in codes.zip(out[2 * run.start..][..2 * run.len].chunks_mut(64)) {
        let mut padded = [0; 16];
        padded[..codes.len()].copy_from_slice(codes);
        let mut result = [0; 64];
        store(&mut result, look_up_32_nibbles(table, avx2::load16(&padded)));
        out.copy_from_slice(&result[..out.len()]);
    }
}

/// Decodes 32 columns of 4-bit codes into 16-bit floats: one scale and one vector for each row.
/// Only the first `run.len` columns are meaningful.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) fn look_up_nibble_column(
    values: &[f32; 16],
    to: Half,
    tile: &Tile<'_>,
    run: ScaleRun,
    out: &mut [[u8; 64]],
) {
    match to {
        Half::BF16 => look_up_nibble_column_to::<false>(values, tile, run, out),
        Half::F16 => look_up_nibble_column_to::<true>(values, tile, run, out),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
fn look_up_nibble_column_to<const F16: bool>(
    values: &[f32; 16],
    tile: &Tile<'_>,
    run: ScaleRun,
    out: &mut [[u8; 64]],
) {
    // SAFETY: the array has 64 bytes; the load needs no alignment.
    let values = unsafe { _mm512_loadu_ps(values.as_ptr()) };
    let scales = tile.scales();
    let mut rows_left = scales.block[0] - scales.phase[0] % scales.block[0];
    let mut at = scales.phase[0] / scales.block[0] * scales.stride + run.index;
    for (row, out) in out[..tile.rows].iter_mut().enumerate() {
        let codes = tile.bytes[row * tile.stride + run.start / 2..].first_chunk();
        let codes = avx2::load16(codes.expect("room for 32 columns"));
        store(out, look_up_32_nibbles(nibble_table::<F16>(values, scales.values[at]), codes));
        rows_left -= 1;
        if rows_left == 0 {
            rows_left = scales.block[0];
            at += scales.stride;
        }
    }
}

/// Decodes 32 4-bit codes by a table of [`nibble_table`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
fn look_up_32_nibbles(table: __m512i, codes: __m128i) -> __m512i {
    let bytes = _mm512_cvtepu8_epi32(codes);
    // Each byte b becomes two 16-bit indices, b << 1 and b >> 3. `vpermw` uses 5 bits of each: a
    // nibble and, below it, a bit that selects the upper half of the 32-bit entry.
    let indices = _mm512_or_si512(_mm512_slli_epi32::<1>(bytes), _mm512_slli_epi32::<13>(bytes));
    _mm512_permutexvar_epi16(_mm512_or_si512(indices, _mm512_set1_epi16(1)), table)
}

/// The results of the 16 codes under `scale`, rounded to BF16 or F16, each in the upper half of 32
/// bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
fn nibble_table<const F16: bool>(values: __m512, scale: f32) -> __m512i {
    // The rounding to BF16 below would carry the payload of some NaNs into the sign bit, so a NaN
    // scale is replaced: `vfixupimm` turns quiet NaNs (token 0) and signalling NaNs (token 1) into
    // the indefinite NaN (response 3). The NaN of infinity times zero is harmless.
    let scale = _mm512_set1_ps(scale);
    let scale = _mm512_fixupimm_ps::<0>(scale, scale, _mm512_set1_epi32(0x33));
    let products = _mm512_mul_ps(values, scale);
    if F16 {
        let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(products);
        _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves))
    } else {
        let bits = _mm512_castps_si512(products);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);
        _mm512_add_epi32(bits, half)
    }
}

/// Transposes the whole tiles of a box and returns how many rows and columns that covers. A tile
/// has 64 rows by 16 columns (1 byte), 32 by 8 (2 bytes) or 16 by 4 (4 bytes); remaining rows go to
/// [`avx2::transpose`], whose tiles have half as many rows.
///
/// The loads put rows that are a quarter of a tile apart into the four 16-byte lanes of a vector.
/// That saves the two rounds of shuffles across lanes that a transpose of a full square needs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) fn transpose<const W: usize>(
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
    let (tile_rows, tile_cols) = (64 / W, 16 / W);
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
    if high < rows {
        let (src, out) = (&src[high * stride..], &mut out[high * W..]);
        let (more, _) = avx2::transpose::<W>(src, stride, rows - high, wide, out, out_stride);
        return (high + more, wide);
    }
    (high, wide)
}

/// Copies `rows` rows of `width` bytes and prefetches as many rows below them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) fn copy_and_prefetch(
    src: &[u8],
    stride: usize,
    rows: usize,
    width: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    assert!(holds(src, rows, stride, width, 1) && holds(out, rows, out_stride, width, 1));
    for row in 0..rows {
        // SAFETY: the row lies in the box, and both slices were checked to hold the box. A prefetch
        // needs no valid address.
        unsafe {
            let src = src.as_ptr().add(row * stride);
            let out = out.as_mut_ptr().add(row * out_stride);
            let line = |at: usize, mask: u64| {
                _mm_prefetch::<_MM_HINT_T0>(src.wrapping_add(rows * stride + at).cast());
                let line = _mm512_maskz_loadu_epi8(mask, src.add(at).cast());
                _mm512_mask_storeu_epi8(out.add(at).cast(), mask, line);
            };
            // Two lines at a time: the compiler replaces a loop over single lines by a `memcpy`.
            let pairs = width - width % 128;
            for at in (0..pairs).step_by(128) {
                line(at, u64::MAX);
                line(at + 64, u64::MAX);
            }
            let whole = width - width % 64;
            if pairs < whole {
                line(pairs, u64::MAX);
            }
            if whole < width {
                line(whole, (1 << (width % 64)) - 1);
            }
        }
    }
}

/// Loads 16 bytes of each of the rows 0, `step`, `2 * step` and `3 * step` into the four lanes of a
/// vector.
///
/// # Safety
/// All four must be readable at `src` with a row pitch of `stride`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
unsafe fn load_strided(src: *const u8, stride: usize, step: usize) -> __m512i {
    // SAFETY: the caller's promise; the loads need no alignment.
    let [a, b, c, d] = unsafe {
        [
            _mm_loadu_si128(src.cast()),
            _mm_loadu_si128(src.add(step * stride).cast()),
            _mm_loadu_si128(src.add(2 * step * stride).cast()),
            _mm_loadu_si128(src.add(3 * step * stride).cast()),
        ]
    };
    let low = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(a), b);
    _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(low, c), d)
}

/// Transposes 64 rows by 16 columns of 1 byte.
///
/// # Safety
/// 64 rows of 16 bytes are readable at `src`, 16 of 64 bytes writable at `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
unsafe fn transpose_tile_u8(src: *const u8, stride: usize, out: *mut u8, out_stride: usize) {
    let mut a = [_mm512_setzero_si512(); 16];
    for (i, a) in a.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *a = unsafe { load_strided(src.add(i * stride), stride, 16) };
    }
    for (i, a) in transpose_lanes(a).into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_si512(out.add(i * out_stride).cast(), a) };
    }
}

/// Transposes 32 rows by 8 columns of 2 bytes.
///
/// # Safety
/// 32 rows of 16 bytes are readable at `src`, 8 of 64 bytes writable at `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
unsafe fn transpose_tile_u16(src: *const u8, stride: usize, out: *mut u8, out_stride: usize) {
    let [mut a, mut b, mut c] = [[_mm512_setzero_si512(); 8]; 3];
    for (i, a) in a.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *a = unsafe { load_strided(src.add(i * stride), stride, 8) };
    }
    for i in [0, 2, 4, 6] {
        b[i] = _mm512_unpacklo_epi16(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi16(a[i], a[i + 1]);
    }
    // Even vectors of b hold columns 0 to 3 of two rows, odd ones columns 4 to 7.
    for i in [0, 1, 4, 5] {
        let at = i + i % 2;
        c[at] = _mm512_unpacklo_epi32(b[i], b[i + 2]);
        c[at + 1] = _mm512_unpackhi_epi32(b[i], b[i + 2]);
    }
    for i in 0..8 {
        let (x, y) = (c[i / 2], c[i / 2 + 4]);
        let column =
            if i % 2 == 0 { _mm512_unpacklo_epi64(x, y) } else { _mm512_unpackhi_epi64(x, y) };
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_si512(out.add(i * out_stride).cast(), column) };
    }
}

/// Transposes 16 rows by 4 columns of 4 bytes.
///
/// # Safety
/// 16 rows of 16 bytes are readable at `src`, 4 of 64 bytes writable at `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
#[inline]
unsafe fn transpose_tile_u32(src: *const u8, stride: usize, out: *mut u8, out_stride: usize) {
    let mut a = [_mm512_setzero_si512(); 4];
    for (i, a) in a.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *a = unsafe { load_strided(src.add(i * stride), stride, 4) };
    }
    let b = [
        _mm512_unpacklo_epi32(a[0], a[1]),
        _mm512_unpackhi_epi32(a[0], a[1]),
        _mm512_unpacklo_epi32(a[2], a[3]),
        _mm512_unpackhi_epi32(a[2], a[3]),
    ];
    for i in 0..4 {
        let (x, y) = (b[i / 2], b[i / 2 + 2]);
        let column =
            if i % 2 == 0 { _mm512_unpacklo_epi64(x, y) } else { _mm512_unpackhi_epi64(x, y) };
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_si512(out.add(i * out_stride).cast(), column) };
    }
}

/// [`rows::compute_rows`], compiled for this level.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) fn compute_rows(tile: &Tile<'_>, to: Float, out: &mut [u8], out_stride: usize) {
    rows::compute_rows(tile, to, out, out_stride);
}

/// [`encode::encode_row`], compiled for this level.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) fn encode_row(
    code: Code,
    values: &[f32],
    scales: &Scales<'_>,
    row_scales: &[f32],
    out: &mut [u8],
) {
    encode::encode_row(code, values, scales, row_scales, out);
}
