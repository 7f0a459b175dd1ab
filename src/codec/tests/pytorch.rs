//! Compares the codec with tensors that PyTorch computed; `tests/golden/codec/make.py` wrote them.

use safetensors::SafeTensors;

use crate::codec::{
    Code, Level, Orientation, ScaleCode, Scales, Tile, copy2d_at, decode_at, encode_at,
    f32_to_scale,
};
use crate::tensor::Float;

static GOLDEN: &[u8] = include_bytes!("../../../tests/golden/codec/codec.safetensors");

fn bytes(name: &str) -> Vec<u8> {
    let golden = SafeTensors::deserialize(GOLDEN).expect("a safetensors file");
    golden.tensor(name).expect("a tensor of make.py").data().to_vec()
}

fn floats(name: &str) -> Vec<f32> {
    bytes(name).as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

/// Whether two 16-bit floats have the same bits, or both are NaN.
fn same(to: Float, ours: [u8; 2], theirs: [u8; 2]) -> bool {
    let largest = if to == Float::BF16 { 0x7f80 } else { 0x7c00 };
    let is_nan = |b: [u8; 2]| u16::from_le_bytes(b) & 0x7fff > largest;
    ours == theirs || is_nan(ours) && is_nan(theirs)
}

fn assert_halves(what: &str, to: Float, ours: &[u8], theirs: &[u8]) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (i, (&a, &b)) in ours.as_chunks().0.iter().zip(theirs.as_chunks().0).enumerate() {
        assert!(same(to, a, b), "{what}: element {i}: expected {b:02x?}, got {a:02x?}");
    }
}

#[test]
fn decoding_equals_pytorch() {
    let scales = floats("scales");
    let fp8: Vec<u8> = (0..=255).collect();
    let nibbles: Vec<u8> = (0..8).map(|i| (2 * i) | ((2 * i + 1) << 4)).collect();
    for (name, code, row, to) in [
        ("e4m3.bf16", Code::E4M3, &fp8, Float::BF16),
        ("e4m3.f16", Code::E4M3, &fp8, Float::F16),
        ("int4.bf16", Code::Int4, &nibbles, Float::BF16),
        ("e2m1.bf16", Code::E2M1, &nibbles, Float::BF16),
    ] {
        let cols = if code == Code::E4M3 { 256 } else { 16 };
        let (codes, rows) = (row.repeat(scales.len()), scales.len());
        let scales = Scales { values: &scales, stride: 1, block: [1, cols], phase: [0, 0] };
        let (bytes_, stride) = (&codes[..], row.len());
        let tile = Tile { code, bytes: bytes_, stride, rows, cols, scales: Some(scales) };
        for level in Level::available() {
            let mut out = vec![0; rows * cols * 2];
            decode_at(level, &tile, to, Orientation::Straight, &mut out, cols * 2);
            assert_halves(&format!("{name} {}", level.name()), to, &out, &bytes(name));
        }
    }
}

#[test]
fn encoding_equals_pytorch() {
    let (numbers, scales) = (floats("numbers"), floats("encode.scales"));
    let (rows, cols) = (scales.len(), numbers.len());
    let values = numbers.repeat(rows);
    let scales = Scales { values: &scales, stride: 1, block: [1, cols], phase: [0, 0] };
    for level in Level::available() {
        let mut out = vec![0; rows * cols];
        encode_at(level, Code::E4M3, &values, cols, rows, cols, Some(&scales), &mut out, cols);
        assert!(out == bytes("encode.e4m3"), "E4M3 {}", level.name());

        let stride = cols.div_ceil(2);
        let mut packed = vec![0; rows * stride];
        encode_at(level, Code::Int4, &values, cols, rows, cols, Some(&scales), &mut packed, stride);
        for (i, &code) in bytes("encode.int4").iter().enumerate() {
            let (row, col) = (i / cols, i % cols);
            let ours = packed[row * stride + col / 2] >> (4 * (col % 2)) & 15;
            assert_eq!(ours, code, "INT4 {} of {}", level.name(), values[i]);
        }
    }
}

#[test]
fn casts_equal_pytorch() {
    let values = floats("cast.f32");
    let n = values.len();
    for (name, code, to) in
        [("cast.bf16", Code::BF16, Float::BF16), ("cast.f16", Code::F16, Float::F16)]
    {
        for level in Level::available() {
            let mut out = vec![0; 2 * n];
            encode_at(level, code, &values, n, 1, n, None, &mut out, 2 * n);
            assert_halves(&format!("{name} {}", level.name()), to, &out, &bytes(name));
        }
    }
    let mut out = vec![0; n];
    f32_to_scale(ScaleCode::E8M0, &values, &mut out);
    assert!(out == bytes("cast.e8m0"));
}

#[test]
fn copies_of_more_than_4_mib_move_every_element() {
    // The output has at least 6.8 MB with its gaps: from 4 MiB on, transposes use non-temporal
    // stores.
    let (rows, cols) = (1100usize, 2056usize);
    for width in [1usize, 2, 4] {
        let bytes = rows * cols * width;
        let from: Vec<u8> =
            (0..bytes).map(|i: usize| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
        for level in Level::available() {
            for orientation in [Orientation::Straight, Orientation::Transposed] {
                // The stride leaves a gap after each row.
                let (out_rows, out_cols) =
                    if orientation == Orientation::Straight { (rows, cols) } else { (cols, rows) };
                let stride = (out_cols * width).next_multiple_of(64) + 4096 / width;
                let mut out = vec![0xAA; out_rows * stride];
                let stored = cols * width;
                copy2d_at(level, width, &from, stored, rows, cols, orientation, &mut out, stride);
                for (r, line) in out.chunks(stride).enumerate() {
                    let (line, gap) = line.split_at(out_cols * width);
                    for (c, got) in line.chunks(width).enumerate() {
                        let at = match orientation {
                            Orientation::Straight => r * cols + c,
                            Orientation::Transposed => c * cols + r,
                        };
                        assert!(got == &from[at * width..][..width], "{}: {r}, {c}", level.name());
                    }
                    assert!(gap.iter().all(|&b| b == 0xAA), "{}: gap of {r}", level.name());
                }
            }
        }
    }
}
