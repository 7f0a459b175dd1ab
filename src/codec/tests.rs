//! Compares every level with the scalar reference: exhaustively where there are few codes and
//! scales, with random data otherwise.

mod encode;
mod pytorch;

use proptest::prelude::*;

use super::{
    Code, Level, Orientation, ScaleCode, Scales, Tile, copy2d_at, decode_at, reference,
    scale_to_f32,
};
use crate::tensor::Float;

const FLOATS: [Float; 3] = [Float::BF16, Float::F16, Float::F32];
const CODES: [Code; 6] = [Code::E4M3, Code::E2M1, Code::Int4, Code::BF16, Code::F16, Code::F32];
const ORIENTATIONS: [Orientation; 2] = [Orientation::Straight, Orientation::Transposed];

/// Fills the output before a test. Elements overwrite it; gaps between rows must keep it.
const FILL_BYTE: u8 = 0xa5;

/// Scales as in real checkpoints, and extreme ones: zeros, subnormals, infinities, NaN.
const SCALES: [f32; 32] = [
    1.0,
    -1.0,
    0.5,
    3.0e-4,
    1.234_568e-3,
    -7.7e-2,
    0.333_333_34,
    1e-10,
    0.0,
    -0.0,
    1e30,
    -3e38,
    f32::MAX,
    f32::MIN_POSITIVE,
    1e-39,
    -1e-44,
    f32::from_bits(1),
    f32::from_bits(0x007f_ffff),
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    f32::from_bits(0x7fff_ffff),
    f32::from_bits(0xff80_0001),
    f32::from_bits(0xffff_ffff),
    // Around 2^-121, 2^-120, 2^119 and 2^120. With scales between them every normal code has a
    // normal result.
    f32::from_bits(6 << 23),
    f32::from_bits((7 << 23) - 1),
    f32::from_bits(7 << 23),
    -f32::from_bits(7 << 23),
    f32::from_bits(246 << 23),
    f32::from_bits((247 << 23) - 1),
    f32::from_bits(247 << 23),
    -f32::from_bits((247 << 23) - 1),
];

/// Pseudorandom numbers from a seed (splitmix64).
fn noise(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

fn number(to: Float, bytes: &[u8]) -> f32 {
    let code = match to {
        Float::BF16 => Code::BF16,
        Float::F16 => Code::F16,
        Float::F32 => Code::F32,
    };
    let stride = bytes.len();
    reference::value(&Tile { code, bytes, stride, rows: 1, cols: 1, scales: None }, 0, 0)
}

/// Decodes at every level and compares the whole output, with its gaps, with the reference. NaNs
/// may differ in their bits.
fn check_decode(tile: &Tile<'_>, to: Float, orientation: Orientation, gap: usize) {
    let (high, wide) = match orientation {
        Orientation::Straight => (tile.rows, tile.cols),
        Orientation::Transposed => (tile.cols, tile.rows),
    };
    let out_stride = wide * to.bytes() + gap;
    let mut expected = vec![FILL_BYTE; high * out_stride];
    reference::decode(tile, to, orientation, &mut expected, out_stride);
    for level in Level::available() {
        let mut out = vec![FILL_BYTE; high * out_stride];
        decode_at(level, tile, to, orientation, &mut out, out_stride);
        for row in 0..high {
            let whole = row * out_stride..(row + 1) * out_stride;
            if out[whole.clone()] == expected[whole] {
                continue;
            }
            for col in 0..wide {
                let at = row * out_stride + col * to.bytes();
                let element = at..at + to.bytes();
                if out[element.clone()] == expected[element.clone()] {
                    continue;
                }
                let (ours, theirs) =
                    (number(to, &out[element.clone()]), number(to, &expected[element.clone()]));
                assert!(
                    ours.is_nan() && theirs.is_nan(),
                    "{} {:?} {to:?} {orientation:?} ({row}, {col}): expected {theirs:e}, got {ours:e}",
                    level.name(),
                    tile.code,
                );
                out[element.clone()].copy_from_slice(&expected[element]);
            }
        }
        assert!(out == expected, "{}: a gap was written", level.name());
    }
}

#[test]
fn every_fp8_code_under_every_scale() {
    let codes: Vec<u8> = (0..=255).chain(0..=255).collect();
    for scale in SCALES {
        for (block, values) in [([2, 256], vec![scale]), ([1, 32], vec![scale; 16])] {
            let scales = Scales { values: &values, stride: 8, block, phase: [0, 0] };
            let tile = Tile {
                code: Code::E4M3,
                bytes: &codes,
                stride: 256,
                rows: 2,
                cols: 256,
                scales: Some(scales),
            };
            for to in FLOATS {
                for orientation in ORIENTATIONS {
                    check_decode(&tile, to, orientation, 0);
                }
            }
        }
    }
}

#[test]
fn every_fp4_code_under_every_e8m0_scale() {
    let stored: Vec<u8> = (0..=255).collect();
    let mut values = [0.0; 256];
    scale_to_f32(ScaleCode::E8M0, &stored, &mut values);
    check_nibbles(Code::E2M1, &values);
}

#[test]
fn every_nibble_under_every_scale() {
    check_nibbles(Code::E2M1, &SCALES);
    check_nibbles(Code::Int4, &SCALES);
}

/// Decodes a matrix with one row of 64 columns for each scale. A row has all sixteen codes in the
/// low and in the high nibble of a byte.
fn check_nibbles(code: Code, values: &[f32]) {
    let row: Vec<u8> = (0..32u8).map(|i| (i % 16) | ((15 - i % 16) << 4)).collect();
    let bytes = row.repeat(values.len());
    let scales = Scales { values, stride: 1, block: [1, 64], phase: [0, 0] };
    let rows = values.len();
    let tile = Tile { code, bytes: &bytes, stride: 32, rows, cols: 64, scales: Some(scales) };
    for to in FLOATS {
        for orientation in ORIENTATIONS {
            check_decode(&tile, to, orientation, 0);
        }
    }
}

/// Matrices of several strips in both directions, whose output rows do not start on cache lines.
#[test]
fn matrices_of_several_strips_equal_the_reference() {
    for (rows, cols) in [(300, 1100), (3, 9001), (1200, 9)] {
        for code in CODES {
            for orientation in ORIENTATIONS {
                let high = if orientation == Orientation::Straight { rows } else { cols };
                // With the second gap the output spans 4 MiB and is written with non-temporal
                // stores.
                for gap in [10, (4 << 20) / high] {
                    let (block, phase) = ([128, 128], [40, 70]);
                    let (to, gaps) = (Float::BF16, [3, gap]);
                    Case {
                        code,
                        to,
                        orientation,
                        rows,
                        cols,
                        gaps,
                        block,
                        phase,
                        scaled: true,
                        seed: 5,
                    }
                    .check();
                }
            }
        }
    }
}

#[test]
fn large_straight_outputs_equal_the_reference() {
    let (rows, cols) = (513, 4100);
    for code in [Code::E4M3, Code::Int4] {
        let (block, phase) = ([128, 128], [0, 0]);
        let (to, orientation) = (Float::BF16, Orientation::Straight);
        let gaps = [0, 6];
        Case { code, to, orientation, rows, cols, gaps, block, phase, scaled: true, seed: 6 }
            .check();
    }
}

#[test]
fn empty_tiles_write_nothing() {
    for (rows, cols) in [(0, 0), (0, 5), (5, 0)] {
        for code in CODES {
            for orientation in ORIENTATIONS {
                let tile = Tile { code, bytes: &[], stride: 0, rows, cols, scales: None };
                decode_at(Level::best(), &tile, Float::BF16, orientation, &mut [], 0);
            }
        }
    }
}

#[test]
fn casts_to_the_same_type_keep_every_bit() {
    let signalling = [0x01, 0x7f, 0x81, 0xff];
    let tile = Tile {
        code: Code::BF16,
        bytes: &signalling.repeat(64),
        stride: 4,
        rows: 64,
        cols: 2,
        scales: None,
    };
    let mut out = [0; 256];
    decode_at(Level::best(), &tile, Float::BF16, Orientation::Straight, &mut out, 4);
    assert_eq!(out, *tile.bytes);
}

/// A random tile and how it is decoded. `gaps` are the bytes after each input and each output row.
#[derive(Debug)]
struct Case {
    code: Code,
    to: Float,
    orientation: Orientation,
    rows: usize,
    cols: usize,
    gaps: [usize; 2],
    block: [usize; 2],
    phase: [usize; 2],
    scaled: bool,
    seed: u64,
}

impl Case {
    fn check(&self) {
        let Case { code, rows, cols, block, phase, .. } = *self;
        let mut next = noise(self.seed);
        let stride = code.row_bytes(cols) + self.gaps[0];
        let bytes: Vec<u8> = (0..rows * stride).map(|_| next() as u8).collect();
        let scale_cols = (cols + phase[1]).div_ceil(block[1]) + 1;
        let scale_rows = (rows + phase[0]).div_ceil(block[0]);
        let values: Vec<f32> = (0..scale_rows * scale_cols)
            .map(|_| match next() % 8 {
                0 => SCALES[(next() % 32) as usize],
                _ => (next() % 4096) as f32 / 65536.0,
            })
            .collect();
        let scales = Scales { values: &values, stride: scale_cols, block, phase };
        let scales = self.scaled.then_some(scales);
        let tile = Tile { code, bytes: &bytes, stride, rows, cols, scales };
        check_decode(&tile, self.to, self.orientation, self.gaps[1]);
    }
}

/// Extents: small ones, multiples of 64 (vectors, strips, blocks) and their neighbours, any others.
fn extent() -> impl Strategy<Value = usize> {
    prop_oneof![
        2 => 0..300usize,
        2 => (1..5usize, 0..3usize).prop_map(|(n, d)| 64 * n + d - 1),
        1 => 0..20usize,
    ]
}

fn block() -> impl Strategy<Value = usize> {
    prop_oneof![Just(128), Just(32), Just(1), Just(64), Just(16), 1..200usize]
}

prop_compose! {
    fn case()(
        code in prop::sample::select(&CODES),
        to in prop::sample::select(&FLOATS),
        orientation in prop::sample::select(&ORIENTATIONS),
        rows in extent(),
        cols in extent(),
        gaps in [0..70usize, 0..70usize],
        block in [block(), block()],
        phase in [prop_oneof![Just(0), 0..200usize], prop_oneof![Just(0), 0..200usize]],
        scaled in prop::bool::weighted(0.9),
        seed in any::<u64>(),
    ) -> Case {
        Case { code, to, orientation, rows, cols, gaps, block, phase, scaled, seed }
    }
}

proptest! {
    #[test]
    fn decoding_equals_the_reference(case in case()) {
        case.check();
    }

    #[test]
    fn copying_equals_the_reference(
        width in prop::sample::select(&[1usize, 2, 4, 8]),
        orientation in prop::sample::select(&ORIENTATIONS),
        rows in extent(),
        cols in extent(),
        gaps in [0..70usize, 0..70usize],
        seed in any::<u64>(),
    ) {
        let mut next = noise(seed);
        let stride = cols * width + gaps[0];
        let src: Vec<u8> = (0..rows * stride).map(|_| next() as u8).collect();
        let (high, wide) = match orientation {
            Orientation::Straight => (rows, cols),
            Orientation::Transposed => (cols, rows),
        };
        let out_stride = wide * width + gaps[1];
        let mut expected = vec![FILL_BYTE; high * out_stride];
        reference::copy2d(width, &src, stride, rows, cols, orientation, &mut expected, out_stride);
        for level in Level::available() {
            let mut out = vec![FILL_BYTE; high * out_stride];
            copy2d_at(level, width, &src, stride, rows, cols, orientation, &mut out, out_stride);
            prop_assert!(out == expected, "{} width {width}", level.name());
        }
    }
}
