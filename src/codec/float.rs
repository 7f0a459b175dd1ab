//! Casts between float types, and the encodings of scales.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::tensor::Float;

/// Encoding of a stored scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ScaleCode {
    /// IEEE 754 binary32, little-endian.
    F32,
    /// bfloat16, little-endian.
    BF16,
    /// IEEE 754 binary16, little-endian.
    F16,
    /// `2^(byte - 127)`; 255 is NaN, 0 is 2^-127 (OCP MX 1.0, section 5.4.1).
    E8M0,
}

impl ScaleCode {
    /// Bytes of one scale.
    pub(crate) fn bytes(self) -> usize {
        match self {
            ScaleCode::F32 => 4,
            ScaleCode::BF16 | ScaleCode::F16 => 2,
            ScaleCode::E8M0 => 1,
        }
    }

    fn as_float(self) -> Option<Float> {
        match self {
            ScaleCode::F32 => Some(Float::F32),
            ScaleCode::BF16 => Some(Float::BF16),
            ScaleCode::F16 => Some(Float::F16),
            ScaleCode::E8M0 => None,
        }
    }
}

/// Decodes stored scales. Exact for every stored value.
///
/// # Panics
/// If `bytes` does not hold exactly `out.len()` scales.
pub(crate) fn scale_to_f32(code: ScaleCode, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * code.bytes(), "bytes of {} scales", out.len());
    match code.as_float() {
        Some(float) => load(float, bytes, out),
        None => {
            for (out, &byte) in out.iter_mut().zip(bytes) {
                *out = e8m0_to_f32(byte);
            }
        }
    }
}

/// Encodes scales as PyTorch casts them: to the nearest, ties to even.
///
/// For E8M0 the sign is dropped, zero becomes 2^-127, and a tie between two powers of two goes to
/// the larger. Magnitudes of 1.5 * 2^127 and above, infinities and NaN become 255, which is NaN.
///
/// # Panics
/// If `out` does not hold exactly `values.len()` scales.
pub(crate) fn f32_to_scale(code: ScaleCode, values: &[f32], out: &mut [u8]) {
    assert_eq!(out.len(), values.len() * code.bytes(), "bytes of {} scales", values.len());
    match code.as_float() {
        Some(float) => store(float, values, out),
        None => {
            for (out, &value) in out.iter_mut().zip(values) {
                *out = e8m0_from_f32(value);
            }
        }
    }
}

/// `2^(byte - 127)`, NaN for 255.
fn e8m0_to_f32(byte: u8) -> f32 {
    match byte {
        // 2^-127 is subnormal: the highest fraction bit.
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}

/// The nearest power of two (c10 `Float8_e8m0fnu.h`, `fp8e8m0fnu_from_fp32_value`).
fn e8m0_from_f32(value: f32) -> u8 {
    let magnitude = value.to_bits() & 0x7fff_ffff;
    let exponent = (magnitude >> 23) as u8;
    let fraction = magnitude & 0x7f_ffff;
    // Subnormal values (exponent 0) have no implicit bit: 1 << 22 is 2^-127 itself, stored as 0.
    let up = fraction > 1 << 22 || (fraction == 1 << 22 && exponent > 0);
    if exponent == 255 { 255 } else { exponent + u8::from(up) }
}

/// Bits of the bfloat16 nearest to `x`, ties to even.
#[inline(always)]
pub(super) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    // A carry out of the fraction correctly raises the exponent, up to infinity. The addition can
    // wrap only for a NaN, for which `quiet` is used: it keeps the sign and the top of the payload.
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

/// Converts floats to `f32`. Exact.
#[inline(always)]
pub(super) fn load(from: Float, bytes: &[u8], out: &mut [f32]) {
    match from {
        Float::BF16 => {
            for (out, &b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16);
            }
        }
        Float::F16 => {
            let mut lanes = [f16::ZERO; LANES];
            for (out, bytes) in out.chunks_mut(LANES).zip(bytes.chunks(2 * LANES)) {
                for (lane, &b) in lanes.iter_mut().zip(bytes.as_chunks().0) {
                    *lane = f16::from_le_bytes(b);
                }
                lanes[..out.len()].convert_to_f32_slice(out);
            }
        }
        Float::F32 => {
            for (out, &b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_le_bytes(b);
            }
        }
    }
}

/// A 16-bit float type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    /// bfloat16.
    BF16,
    /// IEEE 754 binary16.
    F16,
}

impl Half {
    /// `float` as a 16-bit type, or `None` if it is F32.
    pub(super) fn of(float: Float) -> Option<Half> {
        match float {
            Float::BF16 => Some(Half::BF16),
            Float::F16 => Some(Half::F16),
            Float::F32 => None,
        }
    }
}

/// Rounds values to 16-bit floats, to nearest, ties to even, and gives their bits.
#[inline(always)]
pub(super) fn halves(to: Half, values: &[f32], out: &mut [u16]) {
    match to {
        Half::BF16 => {
            for (out, &x) in out.iter_mut().zip(values) {
                *out = bf16_bits(x);
            }
        }
        Half::F16 => {
            let out = &mut out[..values.len()];
            out.reinterpret_cast_mut::<f16>().convert_from_f32_slice(values);
        }
    }
}

/// Stores values as floats of type `to`, rounded to nearest, ties to even.
#[inline(always)]
pub(super) fn store(to: Float, values: &[f32], out: &mut [u8]) {
    match to {
        Float::BF16 => {
            for (out, &x) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *out = bf16_bits(x).to_le_bytes();
            }
        }
        Float::F16 => {
            let mut lanes = [0; LANES];
            for (out, values) in out.chunks_mut(2 * LANES).zip(values.chunks(LANES)) {
                halves(Half::F16, values, &mut lanes);
                for (out, lane) in out.as_chunks_mut().0.iter_mut().zip(&lanes) {
                    *out = lane.to_le_bytes();
                }
            }
        }
        Float::F32 => {
            for (out, &x) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *out = x.to_le_bytes();
            }
        }
    }
}

/// Elements that are copied between unaligned bytes and the aligned slices of the crate `half` at a
/// time. Its slice casts use F16C if the processor has it.
const LANES: usize = 64;

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn bf16_rounding_equals_the_half_crate() {
        // Every upper half of the bits, with lower halves around the tie and at both ends.
        for high in 0..=u16::MAX {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(high) << 16 | low);
                let (ours, theirs) = (bf16::from_bits(bf16_bits(x)), bf16::from_f32(x));
                if x.is_nan() {
                    assert!(ours.is_nan(), "{:08x}", x.to_bits());
                } else {
                    assert_eq!(ours.to_bits(), theirs.to_bits(), "{:08x}", x.to_bits());
                }
            }
        }
    }

    #[test]
    fn f16_rounding_equals_the_portable_cast() {
        let mut values = Vec::new();
        for high in 0..=u16::MAX {
            for low in [0, 1, 0x0fff, 0x1000, 0x1001, 0x8000, 0xffff] {
                values.push(f32::from_bits(u32::from(high) << 16 | low));
            }
        }
        let mut bytes = vec![0; 2 * values.len()];
        store(Float::F16, &values, &mut bytes);
        let mut back = vec![0.0; values.len()];
        load(Float::F16, &bytes, &mut back);
        for (i, (&x, &b)) in values.iter().zip(bytes.as_chunks().0).enumerate() {
            let (ours, expected) = (f16::from_le_bytes(b), f16::from_f32_const(x));
            if x.is_nan() {
                assert!(ours.is_nan() && back[i].is_nan(), "{:08x}", x.to_bits());
            } else {
                assert_eq!(ours.to_bits(), expected.to_bits(), "{:08x}", x.to_bits());
                assert_eq!(back[i].to_bits(), expected.to_f32_const().to_bits());
            }
        }
    }

    #[test]
    fn e8m0_is_a_power_of_two() {
        for byte in 0..=254u8 {
            let expected = 2f64.powi(i32::from(byte) - 127);
            assert_eq!(f64::from(e8m0_to_f32(byte)), expected, "byte {byte}");
            assert_eq!(e8m0_from_f32(e8m0_to_f32(byte)), byte);
        }
        assert!(e8m0_to_f32(255).is_nan());
    }

    #[test]
    fn e8m0_rounds_to_the_nearest_power() {
        for (value, byte) in [
            (0.0, 0),
            (1.49, 127),
            (1.5, 128),
            (-1.0, 127),
            (2f32.powi(-127), 0),
            (f32::from_bits((1 << 22) + 1), 1),
            (f32::MAX, 255),
            (f32::INFINITY, 255),
            (f32::NAN, 255),
        ] {
            assert_eq!(e8m0_from_f32(value), byte, "{value:e}");
        }
    }

    #[test]
    fn scales_survive_a_round_trip() {
        let values = [1.0, 0.5, -3.0, 2f32.powi(-14)];
        for code in [ScaleCode::F32, ScaleCode::BF16, ScaleCode::F16] {
            let mut bytes = vec![0; values.len() * code.bytes()];
            f32_to_scale(code, &values, &mut bytes);
            let mut back = [0.0; 4];
            scale_to_f32(code, &bytes, &mut back);
            assert_eq!(back, values, "{code:?}");
        }
    }
}
