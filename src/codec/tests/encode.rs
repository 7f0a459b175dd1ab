//! Compares the encoders of every level with the reference, and encodes what was decoded.

use proptest::prelude::*;

use super::*;
use crate::codec::{block_amax, encode_at, fp4_scale_e8m0, fp8_scale, int4_scale};

proptest! {
    #[test]
    fn encoding_equals_the_reference(
        code in prop::sample::select(&CODES),
        rows in 0..8usize,
        cols in extent(),
        gaps in [0..70usize, 0..70usize],
        block in [block(), block()],
        phase in [0..200usize, 0..200usize],
        scaled in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut next = noise(seed);
        let stride = cols + gaps[0];
        let values: Vec<f32> = (0..rows * stride)
            .map(|_| match next() % 16 {
                0 => f32::from_bits(next() as u32),
                _ => (next() % 8192) as f32 / 64.0 - 64.0,
            })
            .collect();
        let scale_cols = (cols + phase[1]).div_ceil(block[1]) + 1;
        let scale_rows = (rows + phase[0]).div_ceil(block[0]);
        let scales: Vec<f32> = (0..scale_rows * scale_cols)
            .map(|_| match next() % 8 {
                0 => SCALES[(next() % 32) as usize],
                1 => 1.0,
                _ => (next() % 4096) as f32 / 1024.0,
            })
            .collect();
        let scales = Scales { values: &scales, stride: scale_cols, block, phase };
        let scales = scaled.then_some(&scales);
        let out_stride = code.row_bytes(cols) + gaps[1];
        let mut expected = vec![FILL_BYTE; rows * out_stride];
        reference::encode(code, &values, stride, rows, cols, scales, &mut expected, out_stride);
        for level in Level::available() {
            let mut out = vec![FILL_BYTE; rows * out_stride];
            encode_at(level, code, &values, stride, rows, cols, scales, &mut out, out_stride);
            if let Some(to) = code.as_float() {
                // The bits of a NaN of a float type may differ.
                for row in 0..rows {
                    for col in 0..cols {
                        let at = row * out_stride + col * to.bytes();
                        let element = at..at + to.bytes();
                        if number(to, &out[element.clone()]).is_nan() {
                            prop_assert!(number(to, &expected[element.clone()]).is_nan());
                            out[element.clone()].copy_from_slice(&expected[element]);
                        }
                    }
                }
            }
            prop_assert!(out == expected, "{} {code:?}", level.name());
        }
    }
}

/// Decodes each code to BF16 and encodes the result with the same scale. The code is restored if
/// the decoded number is a normal BF16, or a zero that is not an underflow.
#[test]
fn a_decoded_code_encodes_to_itself() {
    let mut next = noise(7);
    let random = (0..500).map(|_| f32::from_bits(next() as u32));
    let powers = (-140..128).map(|e| 2f32.powi(e));
    let scales: Vec<f32> = SCALES.into_iter().chain(random).chain(powers).collect();
    let mut seen = 0;
    for (code, codes) in [(Code::E4M3, 256), (Code::E2M1, 16), (Code::Int4, 16)] {
        for &scale in &scales {
            for byte in 0..codes {
                let byte = u8::try_from(byte).expect("codes have at most 8 bits");
                let scales = Scales { values: &[scale], stride: 1, block: [1, 1], phase: [0, 0] };
                let tile = Tile {
                    code,
                    bytes: &[byte],
                    stride: 1,
                    rows: 1,
                    cols: 1,
                    scales: Some(scales),
                };
                let mut decoded = [0; 2];
                decode_at(
                    Level::best(),
                    &tile,
                    Float::BF16,
                    Orientation::Straight,
                    &mut decoded,
                    2,
                );
                let x = number(Float::BF16, &decoded);
                let zero = reference::value(&tile, 0, 0) == 0.0 && scale.is_finite();
                if scale == 0.0 || !(x.is_normal() || zero) {
                    continue;
                }
                let mut back = [0];
                encode_at(Level::best(), code, &[x], 1, 1, 1, Some(&scales), &mut back, 1);
                assert_eq!(back, [byte], "{code:?} under {scale:e}: {x:e}");
                seen += 1;
            }
        }
    }
    assert!(seen > 100_000, "{seen}");
}

#[test]
fn the_encoding_error_is_at_most_half_a_step() {
    let mut next = noise(11);
    for round in 0..200 {
        let size = 2f32.powi(round % 40 - 20);
        let values: Vec<f32> =
            (0..128).map(|_| ((next() % 20001) as f32 / 10000.0 - 1.0) * size).collect();
        let amax = block_amax(&values, 128, 1, 128);
        for (code, scale) in [
            (Code::E4M3, fp8_scale(amax)),
            (Code::E2M1, 2f32.powi(i32::from(fp4_scale_e8m0(amax)) - 127)),
            (Code::Int4, int4_scale(amax)),
        ] {
            let scales = Scales { values: &[scale], stride: 1, block: [1, 128], phase: [0, 0] };
            let mut bytes = [0; 128];
            encode_at(Level::best(), code, &values, 128, 1, 128, Some(&scales), &mut bytes, 128);
            let tile =
                Tile { code, bytes: &bytes, stride: 128, rows: 1, cols: 128, scales: Some(scales) };
            for (col, &x) in values.iter().enumerate() {
                let x = x / scale;
                let back = reference::value(&tile, 0, col);
                // Half the distance between codes at x: E4M3 has 3 fraction bits, E2M1 has 1; below
                // the smallest normal number it is constant.
                let half = match code {
                    Code::E4M3 => 2f32.powi(-4) * x.abs().max(2f32.powi(-6)),
                    Code::E2M1 => 0.25 * x.abs().max(1.0),
                    _ => 0.5,
                };
                assert!((back - x).abs() <= half, "{code:?}: {x} came back as {back}");
            }
        }
    }
}
