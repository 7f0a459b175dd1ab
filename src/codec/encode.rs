//! Quantization: the largest magnitude of a block, its scale, and the codes of its elements.
//!
//! The result is deterministic and computed in `f32`. `x / scale` is a true division, not a
//! multiplication by the reciprocal; therefore the codes are bit-exact with PyTorch's.

use super::nibble::{self, Nibble};
use super::{Code, Level, Scales, float, fp8};
use crate::tensor::Float;

/// Largest magnitude of a box of `rows` by `cols` values, whose rows start `stride` values apart; 0
/// for an empty box.
///
/// A NaN in the box makes the result NaN, as PyTorch's `amax` does. The scale is then NaN too, and
/// so is every decoded element: the loss is visible.
///
/// # Panics
/// If `values` is too short for the box.
pub(crate) fn block_amax(values: &[f32], stride: usize, rows: usize, cols: usize) -> f32 {
    let mut amax = 0;
    for row in 0..rows {
        for x in &values[row * stride..][..cols] {
            // Bits of magnitudes, compared as integers, have the order of the magnitudes; every NaN
            // is above infinity.
            amax = amax.max(x.to_bits() & 0x7fff_ffff);
        }
    }
    f32::from_bits(amax)
}

/// F32 scale of an FP8 block: `amax / 448`, or 1 if that is 0.
pub(crate) fn fp8_scale(amax: f32) -> f32 {
    let scale = amax / fp8::MAX;
    if scale == 0.0 { 1.0 } else { scale }
}

/// E8M0 scale of an FP8 block: the smallest power of two with `amax / scale <= 464`.
///
/// Up to 464, the largest code, 448, is within half a step of the value: steps are 32 there. A
/// bound of 448 would encode values from 448 to 464 no better, and would not be stable: a maximum
/// of 225 scales is encoded as 224, for which the next encoding would choose half the scale. This
/// is `scale_fmt: "ue8m0"` of DeepSeek's configurations.
///
/// The result is the stored byte, exponent plus 127: 127 (a scale of 1) for an all-zero block, 255
/// for NaN, 254 for infinity.
pub(crate) fn fp8_scale_e8m0(amax: f32) -> u8 {
    // 464 = 1.8125 * 2^8.
    if amax == 0.0 { 127 } else { e8m0_at_least(amax, 0x68_0000, 8) }
}

/// E8M0 scale of an FP4 group: the smallest power of two that is at least `amax / 6`.
///
/// The result is the stored byte, `ceil(log2(amax / 6)) + 127`, computed exactly and clamped: 0 for
/// an all-zero group, 254 for infinity, 255 for NaN.
pub(crate) fn fp4_scale_e8m0(amax: f32) -> u8 {
    // 6 = 1.5 * 2^2.
    e8m0_at_least(amax, 0x40_0000, 2)
}

/// The E8M0 byte of the smallest power of two that is at least `amax` divided by
/// `(1 + fraction / 2^23) * 2^exponent`.
fn e8m0_at_least(amax: f32, fraction: u32, exponent: u32) -> u8 {
    let bits = amax.to_bits() & 0x7fff_ffff;
    if bits >= f32::INFINITY.to_bits() {
        return if amax.is_nan() { 255 } else { 254 };
    }
    // A subnormal amax has exponent 0 here and gives byte 0, whatever its fraction is.
    let above = u32::from(bits & 0x7f_ffff > fraction);
    let byte = (bits >> 23).saturating_add(above).saturating_sub(exponent);
    u8::try_from(byte).expect("an exponent of at most 254, plus 1, minus at least 2")
}

/// Scale of an INT4 group: `max(amax / 7, 1e-10)`; NaN if `amax` is NaN.
pub(crate) fn int4_scale(amax: f32) -> f32 {
    let scale = amax / 7.0;
    if scale < 1e-10 { 1e-10 } else { scale }
}

/// Encodes a box of `rows` by `cols` values, whose rows start `stride` values apart.
///
/// Row `r` starts at `out[r * out_stride]` and takes [`Code::row_bytes`] of `cols` bytes; all other
/// bytes of `out` keep their contents. An element gets the code that is nearest to `x / scale`,
/// ties to even. The quantized codes have no infinity and saturate: E4M3 at 448 (NaN becomes 0x7F),
/// E2M1 at 6 (-0.0 keeps its sign, NaN becomes 6), INT4 at -8 and 7 (NaN becomes 0). For 4-bit
/// codes and an odd `cols`, the last high nibble of a row is 0. For float codes, `x / scale` is
/// cast.
///
/// # Panics
/// If `values`, the scales or `out` are too short for the box.
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

/// Does what `encode` does with the kernels of a given level.
///
/// # Panics
/// As `encode`.
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

/// Elements that are divided, rounded and packed at a time; even.
const LANES: usize = 256;

/// Encodes one row; `row_scales` is its row of scales.
///
/// Inlined into the kernels, so that it is compiled with their instructions.
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
                fp8::encode(&values[span.clone()], row_scales[run.index], &mut out[span]);
            }
            return;
        }
        Code::BF16 => return cast_row(Float::BF16, values, scales, row_scales, out),
        Code::F16 => return cast_row(Float::F16, values, scales, row_scales, out),
        Code::F32 => return cast_row(Float::F32, values, scales, row_scales, out),
        Code::E2M1 => Nibble::E2M1,
        Code::Int4 => Nibble::Int4,
    };
    // A scale may end between the two nibbles of a byte, so all codes are computed before any is
    // packed.
    let mut codes = [0; LANES];
    let bytes = out.chunks_mut(LANES / 2);
    for (i, (values, out)) in values.chunks(LANES).zip(bytes).enumerate() {
        let codes = &mut codes[..values.len()];
        for run in scales.offset_by(0, i * LANES).col_runs(values.len()) {
            let span = run.start..run.start + run.len;
            nibble.encode(&values[span.clone()], row_scales[run.index], &mut codes[span]);
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
    fn e8m0_scales_are_the_smallest_that_hold_the_maximum() {
        // All powers of two of f32, also subnormal ones, times the fractions where results change,
        // and both neighbours of each product.
        for power in -149..=127i32 {
            for fraction in [1.0, 1.0 + f32::EPSILON, 1.25, 1.5, 1.75, 2.0 - f32::EPSILON] {
                let point = (f64::from(fraction) * 2f64.powi(power)) as f32;
                for amax in [point.next_down(), point, point.next_up()] {
                    if amax <= 0.0 || amax.is_infinite() {
                        continue;
                    }
                    for (byte, largest) in
                        [(fp4_scale_e8m0(amax), 6.0), (fp8_scale_e8m0(amax), 464.0)]
                    {
                        let holds = |byte: i32| f64::from(amax) <= largest * 2f64.powi(byte - 127);
                        let byte = i32::from(byte);
                        assert!(holds(byte), "{amax:e} / {largest}: {byte} is too small");
                        assert!(
                            byte == 0 || !holds(byte - 1),
                            "{amax:e} / {largest}: {byte} is too large"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn scales_of_special_maxima() {
        assert_eq!((fp4_scale_e8m0(0.0), fp8_scale_e8m0(0.0), fp8_scale(0.0)), (0, 127, 1.0));
        assert_eq!((fp4_scale_e8m0(f32::INFINITY), fp8_scale_e8m0(f32::INFINITY)), (254, 254));
        assert_eq!((fp4_scale_e8m0(f32::NAN), fp8_scale_e8m0(f32::NAN)), (255, 255));
        assert_eq!((fp4_scale_e8m0(6.0), fp8_scale_e8m0(464.0)), (127, 127));
        assert_eq!(fp8_scale(f32::from_bits(1)), 1.0);
        assert_eq!((int4_scale(0.0), int4_scale(7.0)), (1e-10, 1.0));
        assert!(int4_scale(f32::NAN).is_nan() && fp8_scale(f32::NAN).is_nan());
    }

    #[test]
    fn amax_covers_only_its_block_and_keeps_nan() {
        let values = [1.0, -2.0, 9.0, -0.0, 1.5, f32::NAN];
        assert_eq!(block_amax(&values, 3, 2, 2), 2.0);
        assert_eq!(block_amax(&values, 3, 1, 3), 9.0);
        assert!(block_amax(&values, 3, 2, 3).is_nan());
        assert_eq!(block_amax(&values, 3, 0, 3).to_bits(), 0);
    }
}
