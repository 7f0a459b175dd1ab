//! FP8 E4M3FN: 1 sign bit, 4 exponent bits of bias 7, 3 fraction bits (OCP OFP8 1.0).
//!
//! It has no infinities; 0x7F and 0xFF are NaN. The largest value is 448, the smallest positive one
//! 2^-9. Scale blocks that are large enough are decoded by a table of 256 results.

use super::Tile;
use super::float::{Half, halves};
use super::tile::ScaleRuns;

/// The largest value.
pub(super) const MAX: f32 = 448.0;

/// The value of every code.
const VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = value(code as u8);
        code += 1;
    }
    values
};

/// The value of a code, without a branch or a look-up, so that loops over it vectorise.
#[inline(always)]
const fn value(code: u8) -> f32 {
    let magnitude = code as u32 & 0x7f;
    // The same fraction with the exponent moved from bias 7 to bias 127.
    let normal = (magnitude << 20) + ((127 - 7) << 23);
    let subnormal = (magnitude as f32 * 0.001953125).to_bits();
    let bits = if magnitude < 8 { subnormal } else { normal };
    let bits = if magnitude == 0x7f { 0x7fc0_0000 } else { bits };
    f32::from_bits(bits | (code as u32 & 0x80) << 24)
}

/// The values of codes. Exact.
#[inline(always)]
pub(super) fn to_f32(bytes: &[u8], out: &mut [f32]) {
    for (out, &byte) in out.iter_mut().zip(bytes) {
        *out = value(byte);
    }
}

/// The decoded 16-bit result of every code under one scale, 512 bytes. The layout is the one that
/// the look-up of the level in use expects.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Fp8Table(pub(super) [[u8; 2]; 256]);

impl Fp8Table {
    /// A table of zeros.
    pub(super) const ZERO: Fp8Table = Fp8Table([[0; 2]; 256]);
}

/// Fills a table with the results of codes 0 to 255, little-endian, one after the other.
#[inline(always)]
pub(super) fn fill_interleaved(to: Half, scale: f32, table: &mut Fp8Table) {
    let mut results = [0; 256];
    halves(to, &VALUES.map(|v| v * scale), &mut results);
    for (pair, result) in table.0.iter_mut().zip(results) {
        *pair = result.to_le_bytes();
    }
}

/// Decodes rows by one table of [`fill_interleaved`] for each run of columns.
pub(super) fn look_up(
    tables: &[Fp8Table],
    runs: &ScaleRuns,
    tile: &Tile<'_>,
    out: &mut [u8],
    out_stride: usize,
) {
    for_each_run(tables, runs, tile, out, out_stride, |table, codes, out| {
        for (out, &code) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
            *out = table.0[usize::from(code)];
        }
    });
}

/// Calls `look_up` for every run of every row, with its table, its codes and its output.
///
/// Inlined into the kernels, so that it is compiled with their instructions.
#[inline(always)]
pub(super) fn for_each_run(
    tables: &[Fp8Table],
    runs: &ScaleRuns,
    tile: &Tile<'_>,
    out: &mut [u8],
    out_stride: usize,
    mut look_up: impl FnMut(&Fp8Table, &[u8], &mut [u8]),
) {
    for row in 0..tile.rows {
        let (codes, out) = (tile.row(row), &mut out[row * out_stride..][..2 * tile.cols]);
        for (run, table) in runs.clone().zip(tables) {
            look_up(
                table,
                &codes[run.start..][..run.len],
                &mut out[2 * run.start..][..2 * run.len],
            );
        }
    }
}

/// Fills a table with the low bytes of the results of codes 0 to 127, then with their high bytes.
///
/// Codes 128 to 255 are the negatives of codes 0 to 127, and so are their results, apart from NaN.
/// The look-up flips their sign bit itself, so that the table takes half as many registers.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn fill_byte_planes(to: Half, scale: f32, table: &mut Fp8Table) {
    let mut results = [0; 128];
    let values: [f32; 128] = std::array::from_fn(|code| VALUES[code] * scale);
    halves(to, &values, &mut results);
    let bytes = table.0.as_flattened_mut();
    for (code, result) in results.into_iter().enumerate() {
        [bytes[code], bytes[128 + code]] = result.to_le_bytes();
    }
}

/// Codes nearest to `x / scale`, ties to even, saturating at 448; NaN becomes 0x7F.
#[inline(always)]
pub(super) fn encode(values: &[f32], scale: f32, out: &mut [u8]) {
    for (out, &x) in out.iter_mut().zip(values) {
        *out = nearest(x / scale);
    }
}

/// The code nearest to `x`.
#[inline(always)]
fn nearest(x: f32) -> u8 {
    let magnitude = (x.to_bits() & 0x7fff_ffff).min(MAX.to_bits());
    // Rounds 20 fraction bits away; a carry out of the fraction correctly raises the exponent.
    let normal = (magnitude + 0x7_ffff + (magnitude >> 20 & 1)) >> 20;
    let normal = normal.wrapping_sub((127 - 7) << 3);
    // The last place of 2^14 is worth 2^-9, so the addition rounds to a multiple of 2^-9.
    let subnormal = (f32::from_bits(magnitude) + 16384.0).to_bits() - 16384f32.to_bits();
    let code = if magnitude < 0.015625f32.to_bits() { subnormal } else { normal };
    let code = code | x.to_bits() >> 24 & 0x80;
    (if x.is_nan() { 0x7f } else { code }) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::reference;

    #[test]
    fn every_code_decodes_to_the_reference_value() {
        for code in 0..=255u8 {
            let (ours, defined) = (VALUES[usize::from(code)], reference::e4m3_to_f32(code));
            assert!(ours.to_bits() == defined.to_bits() || ours.is_nan() && defined.is_nan());
        }
        assert_eq!(VALUES[0x7e], MAX);
        assert_eq!(VALUES[0x01], 2f32.powi(-9));
        assert!(VALUES[0x7f].is_nan() && VALUES[0xff].is_nan());
    }

    #[test]
    fn encoding_is_to_nearest_around_every_code_and_midpoint() {
        let mut points: Vec<f32> = vec![0.0, f32::MIN_POSITIVE, 1e-45, 464.0, 1e30, f32::INFINITY];
        for code in 0..0x7e {
            let (low, high) = (VALUES[code], VALUES[code + 1]);
            points.extend([low, high, (low + high) / 2.0]);
        }
        for point in points {
            for x in [point, point.next_up(), point.next_down()] {
                for x in [x, -x] {
                    assert_eq!(nearest(x), reference::e4m3_from_f32(x), "{x:e}");
                }
            }
        }
        assert_eq!(nearest(f32::NAN), 0x7f);
        assert_eq!(nearest(-f32::NAN), 0x7f);
    }
}
