//! Encoding: block maxima, scales from them, and codes from numbers and scales.
//!
//! Deterministic, in `f32`. The division `x / scale` is a division and no multiplication by a
//! reciprocal: that is what makes the codes those of PyTorch.

use super::nibble::{self, Nibble};
use super::{Code, Level, Scales, float, fp8};
use crate::tensor::Float;

/// Largest magnitude of `rows` by `cols` numbers, `stride` numbers from row to row; 0 for none.
///
/// A NaN among them makes the result a NaN, as PyTorch's `amax` does: scales made of it are NaN,
/// and what is lost shows when it is decoded.
///
/// # Panics
/// Where `values` does not hold the box.
pub(crate) fn block_amax(values: &[f32], stride: usize, rows: usize, cols: usize) -> f32 {
    let mut amax = 0;
    for row in 0..rows {
        for x in &values[row * stride..][..cols] {
            // As integers, magnitudes keep their order, and every NaN is above infinity.
            amax = amax.max(x.to_bits() & 0x7fff_ffff);
        }
    }
    f32::from_bits(amax)
}

/// Scale of an FP8 block: `amax / 448`, and 1 where that is 0.
pub(crate) fn fp8_scale(amax: f32) -> f32 {
    let scale = amax / fp8::MAX;
    if scale == 0.0 { 1.0 } else { scale }
}

/// E8M0 scale of an FP8 block: the smallest power of two under which `amax` is coded within half a
/// step, `amax / scale <= 464` (448 and half of the step of 32 above 256).
///
/// This is `scale_fmt: "ue8m0"` of DeepSeek's configurations. A bound of 448 would code what lies
/// between it and 464 no better, and would not be stable: 225 scales is coded as 224, which the
/// next encoding would scale by half. The stored byte is the exponent plus
/// 127: 127 (the scale 1) for an all-zero block, 255 for a NaN, 254 for infinity.
pub(crate) fn fp8_exponent(amax: f32) -> u8 {
    // 464 = 1.8125 * 2^8.
    if amax == 0.0 { 127 } else { power_at_least(amax, 0x68_0000, 8) }
}

/// E8M0 scale of an FP4 group: the smallest power of two that is at least `amax / 6`.
///
/// The stored byte is `ceil(log2(amax / 6)) + 127`, computed without a logarithm or a rounding, and
/// clamped: 0 for an all-zero group, 254 for infinity. 255 for a NaN.
pub(crate) fn fp4_exponent(amax: f32) -> u8 {
    // 6 = 1.5 * 2^2.
    power_at_least(amax, 0x40_0000, 2)
}

/// The E8M0 byte of the smallest power of two that is at least `amax` divided by
/// `(1 + fraction / 2^23) * 2^exponent`.
fn power_at_least(amax: f32, fraction: u32, exponent: u32) -> u8 {
    let bits = amax.to_bits() & 0x7fff_ffff;
    if bits >= f32::INFINITY.to_bits() {
        return if amax.is_nan() { 255 } else { 254 };
    }
    // A subnormal amax has exponent 0 here, and ends at byte 0 whatever its fraction is.
    let above = u32::from(bits & 0x7f_ffff > fraction);
    let byte = (bits >> 23).saturating_add(above).saturating_sub(exponent);
    u8::try_from(byte).expect("an exponent of at most 254, plus 1, minus at least 2")
}

/// Scale of an INT4 group: `max(amax / 7, 1e-10)`; a NaN stays one.
pub(crate) fn int4_scale(amax: f32) -> f32 {
    let scale = amax / 7.0;
    if scale < 1e-10 { 1e-10 } else { scale }
}

/// Encodes `rows` by `cols` numbers, `stride` numbers from row to row.
///
/// Row `r` starts at `out[r * out_stride]` and takes [`Code::row_bytes`] of `cols` bytes; other
/// bytes of `out` stay. The code is the one nearest to `x / scale`, ties to even, saturating in
/// E4M3 (448; NaN becomes 0x7F), E2M1 (6; -0.0 keeps its sign; NaN becomes 6) and INT4 (-8 and 7;
/// NaN becomes 0), which have no infinity. The last high nibble of an odd row is 0. Floats are
/// cast.
///
/// # Panics
/// Where `values`, the scales or `out` do not hold the box.
#[allow(clippy::too_many_arguments)]
pub(crate) fn encode(
    code: Code,
    values: &[f32],
    stride: usize,
    rows: usize,
    cols: usize,
    scales: Option<&Scales<'_>>,
    out: &mut [u8],
    out_stride: usize,
) {
    encode_at(Level::best(), code, values, stride, rows, cols, scales, out, out_stride);
}

/// [`encode`] with the kernels of one level.
///
/// # Panics
/// As [`encode`].
#[allow(clippy::too_many_arguments)]
pub fn encode_at(
    level: Level,
    code: Code,
    values: &[f32],
    stride: usize,
    rows: usize,
    cols: usize,
    scales: Option<&Scales<'_>>,
    out: &mut [u8],
    out_stride: usize,
) {
    let scales = scales.copied().unwrap_or(Scales::ONE);
    if cols == 0 {
        return;
    }
    for run in scales.row_runs(rows) {
        let row_scales = &scales.values[run.index * scales.stride..];
        for row in run.start..run.start + run.len {
            let values = &values[row * stride..][..cols];
            let out = &mut out[row * out_stride..][..code.row_bytes(cols)];
            level.encode_row(code, values, &scales, row_scales, out);
        }
    }
}

/// Numbers that are in flight between dividing and packing; even.
const LANES: usize = 256;

/// Encodes one row, whose scales are in `row_scales`.
#[inline(always)]
pub(super) fn encode_row(
    code: Code,
    values: &[f32],
    scales: &Scales<'_>,
    row_scales: &[f32],
    out: &mut [u8],
) {
    let nibble = match code {
        Code::E4M3 => {
            for run in scales.col_runs(values.len()) {
                let span = run.start..run.start + run.len;
                fp8::pack(&values[span.clone()], row_scales[run.index], &mut out[span]);
            }
            return;
        }
        Code::BF16 => return cast_row(Float::BF16, values, scales, row_scales, out),
        Code::F16 => return cast_row(Float::F16, values, scales, row_scales, out),
        Code::F32 => return cast_row(Float::F32, values, scales, row_scales, out),
        Code::E2M1 => Nibble::E2M1,
        Code::Int4 => Nibble::Int4,
    };
    // Runs may end between two nibbles of a byte: codes are gathered before they are packed.
    let mut codes = [0; LANES];
    let bytes = out.chunks_mut(LANES / 2);
    for (i, (values, out)) in values.chunks(LANES).zip(bytes).enumerate() {
        let codes = &mut codes[..values.len()];
        for run in scales.from(0, i * LANES).col_runs(values.len()) {
            let span = run.start..run.start + run.len;
            nibble.nearest(&values[span.clone()], row_scales[run.index], &mut codes[span]);
        }
        nibble::pack(codes, out);
    }
}

#[inline(always)]
fn cast_row(to: Float, values: &[f32], scales: &Scales<'_>, row_scales: &[f32], out: &mut [u8]) {
    let mut lanes = [0.0; LANES];
    for run in scales.col_runs(values.len()) {
        let values = &values[run.start..run.start + run.len];
        let out = &mut out[to.bytes() * run.start..];
        let scale = row_scales[run.index];
        for (values, out) in values.chunks(LANES).zip(out.chunks_mut(to.bytes() * LANES)) {
            let lanes = &mut lanes[..values.len()];
            for (lane, &x) in lanes.iter_mut().zip(values) {
                *lane = x / scale;
            }
            float::store(to, lanes, &mut out[..to.bytes() * lanes.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponents_are_the_least_that_hold_the_maximum() {
        // Around every power of two of f32, subnormal ones included, times the critical fractions.
        for power in -149..=127i32 {
            for fraction in [1.0, 1.0 + f32::EPSILON, 1.25, 1.5, 1.75, 2.0 - f32::EPSILON] {
                let point = (f64::from(fraction) * 2f64.powi(power)) as f32;
                for amax in [point.next_down(), point, point.next_up()] {
                    if amax <= 0.0 || amax.is_infinite() {
                        continue;
                    }
                    for (byte, largest) in [(fp4_exponent(amax), 6.0), (fp8_exponent(amax), 464.0)]
                    {
                        let holds = |byte: i32| f64::from(amax) <= largest * 2f64.powi(byte - 127);
                        let byte = i32::from(byte);
                        assert!(holds(byte), "{amax:e} / {largest}: {byte} is too small");
                        assert!(byte == 0 || !holds(byte - 1), "{amax:e} / {largest}: {byte}");
                    }
                }
            }
        }
    }

    #[test]
    fn scales_of_special_maxima() {
        assert_eq!((fp4_exponent(0.0), fp8_exponent(0.0), fp8_scale(0.0)), (0, 127, 1.0));
        assert_eq!((fp4_exponent(f32::INFINITY), fp8_exponent(f32::INFINITY)), (254, 254));
        assert_eq!((fp4_exponent(f32::NAN), fp8_exponent(f32::NAN)), (255, 255));
        assert_eq!((fp4_exponent(6.0), fp8_exponent(464.0)), (127, 127));
        assert_eq!(fp8_scale(f32::from_bits(1)), 1.0);
        assert_eq!((int4_scale(0.0), int4_scale(7.0)), (1e-10, 1.0));
        assert!(int4_scale(f32::NAN).is_nan() && fp8_scale(f32::NAN).is_nan());
    }

    #[test]
    fn amax_sees_the_box_alone_and_keeps_nan() {
        let values = [1.0, -2.0, 9.0, -0.0, 1.5, f32::NAN];
        assert_eq!(block_amax(&values, 3, 2, 2), 2.0);
        assert_eq!(block_amax(&values, 3, 1, 3), 9.0);
        assert!(block_amax(&values, 3, 2, 3).is_nan());
        assert_eq!(block_amax(&values, 3, 0, 3).to_bits(), 0);
    }
}
