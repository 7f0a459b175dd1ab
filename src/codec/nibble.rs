//! Codes of 4 bits, FP4 E2M1 and INT4: packed two to a byte, the even column in the low nibble.
//!
//! Both are decoded by the same code and differ only in the values of the sixteen codes.
//! compressed-tensors' `pack-quantized` packs eight INT4 codes into one little-endian int32: nibble
//! `j` of word `c` is column `8c + j`. Read as bytes, that is the same layout.

use super::float::{Half, halves};
use super::tile::ScaleRuns;
use super::{Tile, rows};

/// A 4-bit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nibble {
    /// Sign, 2 exponent bits of bias 1, 1 fraction bit (OCP MX 1.0).
    E2M1,
    /// The code minus 8.
    Int4,
}

impl Nibble {
    /// The value of every code.
    pub(super) fn values(self) -> &'static [f32; 16] {
        match self {
            Nibble::E2M1 => &[
                0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0,
                -6.0,
            ],
            Nibble::Int4 => &[
                -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0,
                7.0,
            ],
        }
    }

    /// The values of codes that lie one to a byte.
    #[inline(always)]
    pub(super) fn to_f32(self, codes: &[u8], out: &mut [f32]) {
        match self {
            Nibble::E2M1 => {
                for (out, &code) in out.iter_mut().zip(codes) {
                    *out = e2m1_value(code);
                }
            }
            Nibble::Int4 => {
                for (out, &code) in out.iter_mut().zip(codes) {
                    *out = f32::from(code) - 8.0;
                }
            }
        }
    }

    /// The codes nearest to `x / scale`, one to a byte, ties to even, saturating.
    ///
    /// Neither format has a NaN: it becomes 6 in E2M1, as in PTX's `cvt.satfinite`, and 0 in INT4.
    #[inline(always)]
    pub(super) fn encode(self, values: &[f32], scale: f32, out: &mut [u8]) {
        match self {
            Nibble::E2M1 => {
                for (out, &x) in out.iter_mut().zip(values) {
                    *out = e2m1_nearest(x / scale);
                }
            }
            Nibble::Int4 => {
                for (out, &x) in out.iter_mut().zip(values) {
                    *out = int4_nearest(x / scale);
                }
            }
        }
    }
}

/// Decodes rows of 4-bit codes into 16-bit floats by a table of 16 results for each scale.
///
/// Every run starts at an even column.
pub(super) fn look_up(
    values: &[f32; 16],
    to: Half,
    tile: &Tile<'_>,
    runs: &ScaleRuns,
    out: &mut [u8],
    out_stride: usize,
) {
    rows::for_each_row(tile, 2, out, out_stride, |codes, scales, out| {
        look_up_row(values, to, codes, runs.clone(), scales, out);
    });
}

fn look_up_row(
    values: &[f32; 16],
    to: Half,
    codes: &[u8],
    runs: ScaleRuns,
    scales: &[f32],
    out: &mut [u8],
) {
    for run in runs {
        let scale = scales[run.index];
        let mut table = [0; 16];
        halves(to, &values.map(|v| v * scale), &mut table);
        let result = |code: u8| table[usize::from(code)];
        let codes = &codes[run.start / 2..][..run.len.div_ceil(2)];
        let (pairs, last) = out[2 * run.start..][..2 * run.len].as_chunks_mut::<4>();
        let count = pairs.len();
        for (pair, &byte) in pairs.iter_mut().zip(codes) {
            let (low, high) = (result(byte & 15), result(byte >> 4));
            *pair = (u32::from(high) << 16 | u32::from(low)).to_le_bytes();
        }
        if !last.is_empty() {
            last.copy_from_slice(&result(codes[count] & 15).to_le_bytes());
        }
    }
}

/// Unpacks the codes of `out.len()` columns, one to a byte; `bytes` starts with an even column.
#[inline(always)]
pub(super) fn unpack(bytes: &[u8], out: &mut [u8]) {
    let (pairs, last) = out.as_chunks_mut::<2>();
    let count = pairs.len();
    for (pair, &byte) in pairs.iter_mut().zip(bytes) {
        *pair = [byte & 15, byte >> 4];
    }
    for out in last {
        *out = bytes[count] & 15;
    }
}

/// Packs codes two to a byte; if their number is odd, the last high nibble is 0.
#[inline(always)]
pub(super) fn pack(codes: &[u8], out: &mut [u8]) {
    let (pairs, last) = codes.as_chunks::<2>();
    for (out, pair) in out.iter_mut().zip(pairs) {
        *out = pair[0] | pair[1] << 4;
    }
    for &code in last {
        out[pairs.len()] = code;
    }
}

/// The value of an E2M1 code, without a branch or a look-up, so that loops over it vectorise.
#[inline(always)]
fn e2m1_value(code: u8) -> f32 {
    let magnitude = code & 7;
    // The same fraction with the exponent moved from bias 1 to bias 127; 0 and 0.5 are subnormal.
    let normal = (u32::from(magnitude) << 22) + ((127 - 1) << 23);
    let subnormal = (f32::from(magnitude) * 0.5).to_bits();
    let bits = if magnitude < 2 { subnormal } else { normal };
    f32::from_bits(bits | u32::from(code & 8) << 28)
}

#[inline(always)]
fn e2m1_nearest(x: f32) -> u8 {
    let magnitude = (x.to_bits() & 0x7fff_ffff).min(6f32.to_bits());
    // Rounds 22 fraction bits away; a carry out of the fraction correctly raises the exponent.
    let normal = (magnitude + 0x1f_ffff + (magnitude >> 22 & 1)) >> 22;
    let normal = normal.wrapping_sub((127 - 1) << 1);
    // The last place of 2^22 is worth 0.5, so the addition rounds to a multiple of 0.5.
    let subnormal = (f32::from_bits(magnitude) + 4194304.0).to_bits() - 4194304f32.to_bits();
    let code = if magnitude < 1f32.to_bits() { subnormal } else { normal };
    let code = code | x.to_bits() >> 28 & 8;
    (if x.is_nan() { 7 } else { code }) as u8
}

#[inline(always)]
fn int4_nearest(x: f32) -> u8 {
    let x = if x.is_nan() { 0.0 } else { x };
    // The last place of 1.5 * 2^23 is worth 1, so the addition rounds to an integer, ties to even.
    // The bounds are integers, so clamping before the rounding gives the same as clamping after it.
    let rounded = x.clamp(-8.0, 7.0) + 12582912.0;
    (rounded.to_bits() as u8).wrapping_add(8) & 15
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::reference;

    #[test]
    fn every_code_decodes_to_the_reference_value() {
        for code in 0..16u8 {
            for (nibble, defined) in [
                (Nibble::E2M1, reference::e2m1_to_f32(code)),
                (Nibble::Int4, reference::int4_to_f32(code)),
            ] {
                let bits = nibble.values()[usize::from(code)].to_bits();
                assert_eq!(bits, defined.to_bits(), "{nibble:?} {code}");
                let mut number = [0.0];
                nibble.to_f32(&[code], &mut number);
                assert_eq!(number[0].to_bits(), bits, "{nibble:?} {code}");
            }
        }
    }

    #[test]
    fn encoding_is_to_nearest_around_every_quarter() {
        let mut points = vec![1e-45, f32::MIN_POSITIVE, 1e9, f32::MAX, f32::INFINITY];
        points.extend((0..64).map(|i: u16| f32::from(i) / 4.0));
        for point in points {
            for x in [point, point.next_up(), point.next_down()] {
                for x in [x, -x] {
                    assert_eq!(e2m1_nearest(x), reference::e2m1_from_f32(x), "{x:e}");
                    assert_eq!(int4_nearest(x), reference::int4_from_f32(x), "{x:e}");
                }
            }
        }
        for nan in [f32::NAN, -f32::NAN] {
            assert_eq!((e2m1_nearest(nan), int4_nearest(nan)), (7, 8));
        }
    }

    #[test]
    fn the_even_column_is_in_the_low_nibble() {
        for len in 0..=6 {
            let mut out = vec![0; len];
            unpack(&[0x21, 0x43, 0x65], &mut out);
            assert_eq!(out, [1, 2, 3, 4, 5, 6][..len]);
        }
    }

    #[test]
    fn an_odd_count_ends_in_a_zero_nibble() {
        let mut out = [0xff; 3];
        pack(&[1, 2, 3], &mut out);
        assert_eq!(out, [0x21, 0x03, 0xff]);
    }
}
