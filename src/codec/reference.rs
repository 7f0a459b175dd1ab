//! Scalar reference implementation: one element at a time, straight from the definitions of the
//! formats.
//!
//! Every faster path must give the same bits, and the tests compare them. Values come from powers
//! of two, the nearest code from a search of all codes, 16-bit casts from the portable code of the
//! crate `half`. It is slow on purpose and stays in the library.

use half::{bf16, f16};

use super::{Code, Orientation, Scales, Tile};
use crate::tensor::Float;

/// The value of an E4M3 code.
pub fn e4m3_to_f32(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * fraction / 8.0 * 2f32.powi(-6),
        _ => sign * (1.0 + fraction / 8.0) * 2f32.powi(exponent - 7),
    }
}

/// The value of an E2M1 code, 0 to 15.
pub fn e2m1_to_f32(code: u8) -> f32 {
    let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
    sign * [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)]
}

/// The value of an INT4 code, 0 to 15.
pub fn int4_to_f32(code: u8) -> f32 {
    f32::from(code) - 8.0
}

/// The E4M3 code nearest to `x`, ties to the even code, saturating at 448; 0x7F for NaN.
pub fn e4m3_from_f32(x: f32) -> u8 {
    if x.is_nan() {
        return 0x7f;
    }
    nearest(x.abs(), 0x7e, e4m3_to_f32) | if x.is_sign_negative() { 0x80 } else { 0 }
}

/// The E2M1 code nearest to `x`, ties to the even code, saturating at 6; 7 for NaN.
pub fn e2m1_from_f32(x: f32) -> u8 {
    if x.is_nan() {
        return 7;
    }
    nearest(x.abs(), 7, e2m1_to_f32) | if x.is_sign_negative() { 8 } else { 0 }
}

/// The INT4 code of `x`: rounded half to even, clamped to -8 and 7, plus 8; 8 for NaN.
pub fn int4_from_f32(x: f32) -> u8 {
    if x.is_nan() {
        return 8;
    }
    (x.round_ties_even().clamp(-8.0, 7.0) + 8.0) as u8
}

/// The code from 0 to `last` whose value is nearest to `x >= 0`, ties to the even code.
fn nearest(x: f32, last: u8, value: fn(u8) -> f32) -> u8 {
    let distance = |code: &u8| (f64::from(x) - f64::from(value(*code))).abs();
    let x_is_beyond = x > value(last);
    let closer =
        |a: &u8, b: &u8| distance(a).total_cmp(&distance(b)).then_with(|| (a % 2).cmp(&(b % 2)));
    if x_is_beyond { last } else { (0..=last).min_by(closer).expect("code 0 is there") }
}

/// The unscaled value of element `(row, col)` of a tile.
pub fn value(tile: &Tile<'_>, row: usize, col: usize) -> f32 {
    let bytes = &tile.bytes[row * tile.stride..];
    let nibble = |col: usize| bytes[col / 2] >> (4 * (col % 2)) & 15;
    match tile.code {
        Code::E4M3 => e4m3_to_f32(bytes[col]),
        Code::E2M1 => e2m1_to_f32(nibble(col)),
        Code::Int4 => int4_to_f32(nibble(col)),
        Code::BF16 => bf16::from_le_bytes([bytes[2 * col], bytes[2 * col + 1]]).to_f32_const(),
        Code::F16 => f16::from_le_bytes([bytes[2 * col], bytes[2 * col + 1]]).to_f32_const(),
        Code::F32 => f32::from_le_bytes(std::array::from_fn(|i| bytes[4 * col + i])),
    }
}

/// Writes `x` as a float of type `to`.
pub fn write(to: Float, x: f32, out: &mut [u8]) {
    match to {
        Float::BF16 => out.copy_from_slice(&bf16::from_f32_const(x).to_le_bytes()),
        Float::F16 => out.copy_from_slice(&f16::from_f32_const(x).to_le_bytes()),
        Float::F32 => out.copy_from_slice(&x.to_le_bytes()),
    }
}

/// Does what `codec::decode` does, one element at a time.
pub fn decode(
    tile: &Tile<'_>,
    to: Float,
    orientation: Orientation,
    out: &mut [u8],
    out_stride: usize,
) {
    let width = to.bytes();
    if tile.scales.is_none() && tile.code.as_float() == Some(to) {
        let Tile { bytes, stride, rows, cols, .. } = *tile;
        return copy2d(width, bytes, stride, rows, cols, orientation, out, out_stride);
    }
    for row in 0..tile.rows {
        for col in 0..tile.cols {
            let at = output_offset(orientation, row, col, width, out_stride);
            let scale = tile.scales.map_or(1.0, |s| s.at(row, col));
            write(to, value(tile, row, col) * scale, &mut out[at..at + width]);
        }
    }
}

/// Does what `codec::copy2d` does, one element at a time.
#[allow(clippy::too_many_arguments)]
pub fn copy2d(
    width: usize,
    src: &[u8],
    src_stride: usize,
    rows: usize,
    cols: usize,
    orientation: Orientation,
    out: &mut [u8],
    out_stride: usize,
) {
    for row in 0..rows {
        for col in 0..cols {
            let at = output_offset(orientation, row, col, width, out_stride);
            let from = row * src_stride + col * width;
            out[at..at + width].copy_from_slice(&src[from..from + width]);
        }
    }
}

/// Offset of element `(row, col)` of the source in the output, in bytes.
fn output_offset(
    orientation: Orientation,
    row: usize,
    col: usize,
    width: usize,
    out_stride: usize,
) -> usize {
    match orientation {
        Orientation::Straight => row * out_stride + col * width,
        Orientation::Transposed => col * out_stride + row * width,
    }
}

/// Does what `codec::encode` does, one element at a time.
#[allow(clippy::too_many_arguments)]
pub fn encode(
    code: Code,
    values: &[f32],
    stride: usize,
    rows: usize,
    cols: usize,
    scales: Option<&Scales<'_>>,
    out: &mut [u8],
    out_stride: usize,
) {
    for row in 0..rows {
        let out = &mut out[row * out_stride..];
        for col in 0..cols {
            let x = values[row * stride + col] / scales.map_or(1.0, |s| s.at(row, col));
            let mut nibble = |code: u8| match col % 2 {
                0 => out[col / 2] = code,
                _ => out[col / 2] |= code << 4,
            };
            match code {
                Code::E4M3 => out[col] = e4m3_from_f32(x),
                Code::E2M1 => nibble(e2m1_from_f32(x)),
                Code::Int4 => nibble(int4_from_f32(x)),
                Code::BF16 => write(Float::BF16, x, &mut out[2 * col..2 * col + 2]),
                Code::F16 => write(Float::F16, x, &mut out[2 * col..2 * col + 2]),
                Code::F32 => write(Float::F32, x, &mut out[4 * col..4 * col + 4]),
            }
        }
    }
}
