//! AVX2 and F16C: vectors of 32 bytes, look-ups among 16 of them.

mod moves;

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::float::Half;
use super::super::fp8::{self, Table};
use super::super::tile::{Run, Runs, Split};
use super::super::{Code, Scales, Tile, encode, rows};
use crate::tensor::Float;

pub(super) use moves::{fence, fetch, prefetch, stream, transpose};

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
fn store2(bytes: &mut [u8; 64], [first, second]: [__m256i; 2]) {
    let at: *mut __m256i = bytes.as_mut_ptr().cast();
    // SAFETY: the array has 64 bytes; the stores need no alignment.
    unsafe {
        _mm256_storeu_si256(at, first);
        _mm256_storeu_si256(at.add(1), second);
    }
}

/// Bytes of an FP8 table where the sixteen results of a regular scale lie, low bytes first.
const SIXTEEN: Range<usize> = 256..288;

/// Byte of an FP8 table that is 1 where its scale is regular.
const IS_REGULAR: usize = 288;

/// The table of one FP8 scale: low bytes of the results of codes 0 to 127, then high bytes, each
/// row of sixteen but the first as its difference (exclusive or) from the row before.
///
/// Under a regular scale sixteen results say everything. It is one that makes a normal BF16 of
/// every normal code: then the exponent of a code only adds to that of the result, and the table
/// holds the results of fractions 0 to 7 under exponent 0, followed by those of the subnormal
/// codes.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn table(to: Half, scale: f32, table: &mut Table) {
    fp8::planes(to, scale, table);
    let bytes = table.0.as_flattened_mut();
    let result = |code: usize| u16::from_le_bytes([bytes[code], bytes[128 + code]]);
    // Exponents of codes go from 1 to 15, those of normal results from 1 to 254.
    let is_regular = to == Half::BF16
        && (8..16).all(|code| (1..=254 - 14).contains(&(result(code) >> 7 & 0xff)));
    if is_regular {
        let sixteen: [u16; 16] = std::array::from_fn(|i| match i {
            0..8 => result(8 + i) - (1 << 7),
            _ => result(i - 8),
        });
        let (low, high) = bytes[SIXTEEN].split_at_mut(16);
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

/// FP8 codes to 16-bit floats.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn look_up(
    tables: &[Table],
    runs: &Runs,
    tile: &Tile<'_>,
    out: &mut [u8],
    out_stride: usize,
) {
    fp8::each_run(tables, runs, tile, out, out_stride, |table, codes, out| {
        look_up_run(table, codes, out);
    });
}

/// A run of codes, by one table.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn look_up_run(table: &Table, codes: &[u8], out: &mut [u8]) {
    let bytes = table.0.as_flattened();
    if bytes[IS_REGULAR] == 1 {
        let (sixteen, _) = bytes[SIXTEEN].as_chunks::<16>();
        look_up_regular(&sixteen[0], &sixteen[1], codes, out);
    } else {
        let (rows, _) = bytes.as_chunks::<16>();
        look_up_any(rows[..16].try_into().expect("sixteen rows"), codes, out);
    }
}

/// FP8 codes to BF16 under a regular scale: `vpshufb` looks the fraction up, the exponent is added.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn look_up_regular(low: &[u8; 16], high: &[u8; 16], codes: &[u8], out: &mut [u8]) {
    let low = _mm256_broadcastsi128_si256(load16(low));
    let high = _mm256_broadcastsi128_si256(load16(high));
    let zero = _mm256_setzero_si256();
    let results = |codes| {
        // Unpacking works in lanes of 16 bytes: codes 8k.. and 16 + 8k.. go to lane k first.
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
        // The addition saturates, so that a NaN, all ones, stays one.
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
        store2(out, results(load(codes)));
    }
    if !tail.is_empty() {
        let mut padded = [0; 32];
        padded[..tail.len()].copy_from_slice(tail);
        let mut both = [0; 64];
        store2(&mut both, results(load(&padded)));
        out_tail.copy_from_slice(&both[..out_tail.len()]);
    }
}

/// FP8 codes to 16-bit floats: `vpshufb` looks the low four bits up in every row of the table up to
/// that of the code, and the differences add up to the row of the code.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn look_up_any(rows: &[[u8; 16]; 16], codes: &[u8], out: &mut [u8]) {
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
        store2(out, results(load(codes)));
    }
    if !tail.is_empty() {
        let mut padded = [0; 32];
        padded[..tail.len()].copy_from_slice(tail);
        let mut both = [0; 64];
        store2(&mut both, results(load(&padded)));
        out_tail.copy_from_slice(&both[..out_tail.len()]);
    }
}

/// Rows of nibbles to 16-bit floats: the low and the high bytes of the sixteen results of a scale
/// fill a register each.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn nibbles(
    values: &[f32; 16],
    to: Half,
    tile: &Tile<'_>,
    runs: &Split,
    out: &mut [u8],
    out_stride: usize,
) {
    match to {
        Half::BF16 => rows::each(tile, 2, out, out_stride, |codes, scales, out| {
            nibbles_to::<false>(values, codes, runs, scales, out);
        }),
        Half::F16 => rows::each(tile, 2, out, out_stride, |codes, scales, out| {
            nibbles_to::<true>(values, codes, runs, scales, out);
        }),
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
    let Split { block, blocks, head, body, tail, .. } = *runs;
    nibbles_of::<F16>(values, codes, head, scales, out);
    if block.is_multiple_of(32) {
        let scales = &scales[body.index..][..blocks];
        for (i, &scale) in scales.iter().enumerate() {
            let table = sixteen::<F16>(values, scale);
            let start = body.start + i * block;
            let (codes, _) = codes[start / 2..][..block / 2].as_chunks::<16>();
            let (out, _) = out[2 * start..][..2 * block].as_chunks_mut::<64>();
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

/// [`rows::direct`] with these vectors.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn direct(tile: &Tile<'_>, to: Float, out: &mut [u8], out_stride: usize) {
    rows::direct(tile, to, out, out_stride);
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
