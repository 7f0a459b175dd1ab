//! Kernels for AVX2 and F16C: vectors of 32 bytes, look-ups (`vpshufb`) in tables of 16 bytes.

mod moves;

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::float::Half;
use super::super::fp8::{self, Fp8Table};
use super::super::tile::{ScaleRun, ScaleRuns, SplitRuns};
use super::super::{Code, Scales, Tile, encode, rows};
use crate::tensor::Float;

pub(super) use moves::{copy_and_prefetch, copy_non_temporal, fence, prefetch, transpose};

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

/// Stores 64 bytes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn store64(bytes: &mut [u8; 64], [first, second]: [__m256i; 2]) {
    let at: *mut __m256i = bytes.as_mut_ptr().cast();
    // SAFETY: the array has 64 bytes; the stores need no alignment.
    unsafe {
        _mm256_storeu_si256(at, first);
        _mm256_storeu_si256(at.add(1), second);
    }
}

/// Position in an FP8 table of the 16 results of a regular scale: their low bytes, then their high
/// bytes.
const REGULAR_TABLE: Range<usize> = 256..288;

/// Index of the byte of an FP8 table that is 1 if its scale is regular.
const IS_REGULAR: usize = 288;

/// Fills the table of one FP8 scale: the low bytes of the results of codes 0 to 127, then their
/// high bytes. Both are rows of 16 bytes; each row but the first is stored as its exclusive or with
/// the row before, for [`look_up_any`].
///
/// A scale is regular if every normal code becomes a normal BF16. Then the exponent of the code is
/// simply added to the exponent of the result, and 16 results are enough: those of fractions 0 to 7
/// at exponent 0, followed by those of the 8 subnormal codes.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn fill_table(to: Half, scale: f32, table: &mut Fp8Table) {
    fp8::fill_byte_planes(to, scale, table);
    let bytes = table.0.as_flattened_mut();
    let result = |code: usize| u16::from_le_bytes([bytes[code], bytes[128 + code]]);
    // Normal codes have exponents 1 to 15, normal results 1 to 254.
    let is_regular = to == Half::BF16
        && (8..16).all(|code| (1..=254 - 14).contains(&(result(code) >> 7 & 0xff)));
    if is_regular {
        let sixteen: [u16; 16] = std::array::from_fn(|i| match i {
            0..8 => result(8 + i) - (1 << 7),
            _ => result(i - 8),
        });
        let (low, high) = bytes[REGULAR_TABLE].split_at_mut(16);
        for ((low, high), result) in low.iter_mut().zip(high).zip(sixteen) {
            [*low, *high] = result.to_le_bytes();
        }
    }
    bytes[IS_REGULAR] = u8::from(is_regular);
    let rows = bytes.as_chunks_mut::<16>().0;
    for plane in rows[..16].chunks_exact_mut(8) {
        for row in (1..8).rev() {
            let before = load16(&plane[row - 1]);
            let difference = _mm_xor_si128(load16(&plane[row]), before);
            store16(&mut plane[row], difference);
        }
    }
}

/// Decodes FP8 codes into 16-bit floats.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn look_up(
    tables: &[Fp8Table],
    runs: &ScaleRuns,
    tile: &Tile<'_>,
    out: &mut [u8],
    out_stride: usize,
) {
    fp8::for_each_run(tables, runs, tile, out, out_stride, |table, codes, out| {
        look_up_run(table, codes, out);
    });
}

/// Decodes a run of codes by one table.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn look_up_run(table: &Fp8Table, codes: &[u8], out: &mut [u8]) {
    let bytes = table.0.as_flattened();
    if bytes[IS_REGULAR] == 1 {
        let (planes, _) = bytes[REGULAR_TABLE].as_chunks::<16>();
        look_up_regular(&planes[0], &planes[1], codes, out);
    } else {
        let (rows, _) = bytes.as_chunks::<16>();
        look_up_any(rows[..16].try_into().expect("sixteen rows"), codes, out);
    }
}

/// Decodes FP8 codes into BF16 under a regular scale: `vpshufb` looks up the fraction, then the
/// exponent is added.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn look_up_regular(low: &[u8; 16], high: &[u8; 16], codes: &[u8], out: &mut [u8]) {
    let low = _mm256_broadcastsi128_si256(load16(low));
    let high = _mm256_broadcastsi128_si256(load16(high));
    let zero = _mm256_setzero_si256();
    let results = |codes| {
        // Unpacking works within lanes of 16 bytes. Lane k therefore gets the eight codes from 8k
        // on and the eight from 16 + 8k on.
        let codes = _mm256_permute4x64_epi64::<0b11_01_10_00>(codes);
        let exponent = _mm256_and_si256(codes, _mm256_set1_epi8(0x78));
        let fraction = _mm256_and_si256(codes, _mm256_set1_epi8(7));
        let is_subnormal = _mm256_cmpeq_epi8(exponent, zero);
        let second = _mm256_and_si256(is_subnormal, _mm256_set1_epi8(8));
        let index = _mm256_or_si256(fraction, second);
        let sign = _mm256_and_si256(codes, _mm256_set1_epi8(i8::MIN));
        let magnitude = _mm256_or_si256(exponent, fraction);
        let is_nan = _mm256_cmpeq_epi8(magnitude, _mm256_set1_epi8(0x7f));
        let low = _mm256_or_si256(_mm256_shuffle_epi8(low, index), is_nan);
        let high = _mm256_xor_si256(_mm256_shuffle_epi8(high, index), sign);
        let high = _mm256_or_si256(high, is_nan);
        // The addition saturates, so that a NaN, all ones, stays a NaN.
        [
            _mm256_adds_epu16(
                _mm256_unpacklo_epi8(low, high),
                _mm256_slli_epi16::<4>(_mm256_unpacklo_epi8(exponent, zero)),
            ),
            _mm256_adds_epu16(
                _mm256_unpackhi_epi8(low, high),
                _mm256_slli_epi16::<4>(_mm256_unpackhi_epi8(exponent, zero)),
            ),
        ]
    };
    let (whole, tail) = codes.as_chunks::<32>();
    let (out, out_tail) = out.as_chunks_mut::<64>();
    for (codes, out) in whole.iter().zip(out) {
        store64(out, results(load(codes)));
    }
    if !tail.is_empty() {
        let mut padded = [0; 32];
        padded[..tail.len()].copy_from_slice(tail);
        let mut both = [0; 64];
        store64(&mut both, results(load(&padded)));
        out_tail.copy_from_slice(&both[..out_tail.len()]);
    }
}

/// Decodes FP8 codes into 16-bit floats under any scale. `vpshufb` looks up the low four bits of
/// the code in every row of the table up to the code's own row; the exclusive or of these
/// differences is the entry of the code's row.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn look_up_any(rows: &[[u8; 16]; 16], codes: &[u8], out: &mut [u8]) {
    let sign = _mm256_set1_epi8(i8::MIN);
    let results = |codes| {
        // Unpacking works within lanes of 16 bytes. Lane k therefore gets the eight codes from 8k
        // on and the eight from 16 + 8k on.
        let codes = _mm256_permute4x64_epi64::<0b11_01_10_00>(codes);
        let mut index = _mm256_andnot_si256(sign, codes);
        let row = |i: usize, index| {
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load16(&rows[i])), index)
        };
        let (mut low, mut high) = (row(0, index), row(8, index));
        for i in 1..8 {
            // In rows beyond the code's own the index is negative, and `vpshufb` gives 0.
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
        store64(out, results(load(codes)));
    }
    if !tail.is_empty() {
        let mut padded = [0; 32];
        padded[..tail.len()].copy_from_slice(tail);
        let mut both = [0; 64];
        store64(&mut both, results(load(&padded)));
        out_tail.copy_from_slice(&both[..out_tail.len()]);
    }
}

/// Decodes rows of 4-bit codes into 16-bit floats. The low bytes of the 16 results of a scale fill
/// one register, their high bytes another.
#[target_feature(enable = "avx2,f16c")]
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

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn look_up_nibble_row<const F16: bool>(
    values: &[f32; 16],
    codes: &[u8],
    runs: &SplitRuns,
    scales: &[f32],
    out: &mut [u8],
) {
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
                look_up_32_nibbles(table, load16(codes), out);
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
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn look_up_nibble_run<const F16: bool>(
    values: &[f32; 16],
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
        look_up_32_nibbles(table, load16(&padded), &mut result);
        out.copy_from_slice(&result[..out.len()]);
    }
}

/// Decodes 32 4-bit codes by a table of [`nibble_table`].
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn look_up_32_nibbles([low, high]: [__m128i; 2], codes: __m128i, out: &mut [u8; 64]) {
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

/// The results of the 16 codes under `scale`, rounded to BF16 or F16: their low bytes and their
/// high bytes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn nibble_table<const F16: bool>(values: &[f32; 16], scale: f32) -> [__m128i; 2] {
    // The rounding of `bf16_bits` would carry the payload of some NaNs into the sign bit, so a NaN
    // scale is replaced by the default NaN. The NaN of infinity times zero is harmless.
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
        // Packing works within lanes of 16 bytes; the permutation restores the order.
        let pairs = _mm256_packus_epi32(bf16_bits(first), bf16_bits(second));
        _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs)
    };
    let low = _mm256_and_si256(results, _mm256_set1_epi16(0xff));
    let high = _mm256_srli_epi16::<8>(results);
    let planes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(low, high));
    [_mm256_castsi256_si128(planes), _mm256_extracti128_si256::<1>(planes)]
}

/// Bits of the nearest BF16, ties to even, in 32 bits each. `x` is no NaN whose payload is all
/// ones.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn bf16_bits(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd);
    _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half))
}

/// [`rows::compute_rows`], compiled for this level.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn compute_rows(tile: &Tile<'_>, to: Float, out: &mut [u8], out_stride: usize) {
    rows::compute_rows(tile, to, out, out_stride);
}

/// [`encode::encode_row`], compiled for this level.
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
