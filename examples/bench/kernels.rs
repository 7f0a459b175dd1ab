//! Measures decoders, encoders and transposes of whole matrices on one core, from memory to memory.
//! The baseline is memcpy.

use std::hint::black_box;

use anyhow::Result;
use mount_ckpt::Float;
use mount_ckpt::bench::{
    Buffer, Code, Level, Orientation, Scales, Tile, copy2d_at, decode_at, encode_at,
};

use super::table::{Row, Value, compare};

/// Rows of a matrix of MiMo's experts.
const ROWS: usize = 2048;
const COLS: usize = 4096;
/// Matrices of one run: 64 MiB of BF16, more than the caches of a core.
const MATRICES: usize = 4;
const ELEMENTS: usize = MATRICES * ROWS * COLS;

/// Inputs and output of all kernels.
struct Memory {
    codes: Buffer,
    numbers: Vec<f32>,
    scales: Vec<f32>,
    out: Buffer,
}

/// A buffer in huge pages, as the engine uses them. Filling it makes the kernel allocate all pages.
fn filled(len: usize, byte: impl Fn(usize) -> u8) -> Buffer {
    let mut buffer = Buffer::huge(len);
    buffer.iter_mut().enumerate().for_each(|(i, b)| *b = byte(i));
    buffer
}

/// The table rows of all kernels, for each SIMD level of this machine. The portable level has no
/// target and is not measured.
pub fn rows(rounds: usize, wanted: &impl Fn(&str) -> bool) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut memory = Memory {
        codes: filled(2 * ELEMENTS, |i| (i.wrapping_mul(2_654_435_761) >> 13) as u8),
        numbers: (0..ELEMENTS).map(|i| (i * 7919 % 10_007) as f32 * 1e-3 - 5.0).collect(),
        scales: (0..ROWS * COLS / 32).map(|i| 1e-3 + i as f32 * 1e-9).collect(),
        out: filled(2 * ELEMENTS, |_| 1),
    };
    for level in Level::available() {
        if level == Level::PORTABLE {
            continue;
        }
        for (what, at_least, run) in kernels(level) {
            let name = format!("{what}, {}", level.name());
            if !wanted(&name) {
                continue;
            }
            // Encoders are compared by the bytes that they read, the others by what they write.
            let moved = if what.starts_with("encode") { 4 * ELEMENTS } else { 2 * ELEMENTS };
            let from = filled(moved, |_| 1);
            let mut to = filled(moved, |_| 1);
            let rates = compare(
                rounds,
                || {
                    run(level, &mut memory);
                    Ok(moved as u64)
                },
                || {
                    black_box(&mut to).copy_from_slice(black_box(&from));
                    Ok(moved as u64)
                },
            )?;
            rows.push(Row { name, against: "memcpy", value: Value::Ratio { rates, at_least } });
        }
    }
    Ok(rows)
}

type Kernel = fn(Level, &mut Memory);

fn kernels(level: Level) -> [(&'static str, f64, Kernel); 10] {
    let fp8 = if level.name() == "avx512" { 0.45 } else { 0.35 };
    [
        ("FP8 to BF16, transposed", fp8, |l, m| transposed(l, Code::E4M3, m)),
        ("FP8 to BF16, straight", 0.6, |l, m| straight(l, Code::E4M3, m)),
        ("INT4 to BF16, transposed", 0.4, |l, m| transposed(l, Code::Int4, m)),
        ("INT4 to BF16, straight", 0.6, |l, m| straight(l, Code::Int4, m)),
        ("FP4 to BF16, transposed", 0.4, |l, m| transposed(l, Code::E2M1, m)),
        ("FP4 to BF16, straight", 0.6, |l, m| straight(l, Code::E2M1, m)),
        ("transpose of BF16", 0.5, transpose),
        ("encode FP8", 0.25, |l, m| encode(l, Code::E4M3, m)),
        ("encode INT4", 0.25, |l, m| encode(l, Code::Int4, m)),
        ("encode FP4", 0.25, |l, m| encode(l, Code::E2M1, m)),
    ]
}

/// The scales of a matrix of codes: blocks of 128 x 128 for FP8, groups of 32 columns otherwise.
fn scales_of(code: Code, values: &[f32]) -> Scales<'_> {
    let block = if code == Code::E4M3 { [128, 128] } else { [1, 32] };
    Scales { values, stride: COLS / block[1], block, phase: [0, 0] }
}

fn transposed(level: Level, code: Code, memory: &mut Memory) {
    let Memory { codes, scales, out, .. } = memory;
    let row = code.row_bytes(COLS);
    for (bytes, out) in codes.chunks(ROWS * row).zip(out.chunks_mut(2 * ROWS * COLS)) {
        let scales = Some(scales_of(code, scales));
        let tile = Tile { code, bytes, stride: row, rows: ROWS, cols: COLS, scales };
        decode_at(level, &tile, Float::BF16, Orientation::Transposed, out, 2 * ROWS);
    }
}

fn straight(level: Level, code: Code, memory: &mut Memory) {
    let Memory { codes, scales, out, .. } = memory;
    let row = code.row_bytes(COLS);
    for (bytes, out) in codes.chunks(ROWS * row).zip(out.chunks_mut(2 * ROWS * COLS)) {
        let scales = Some(scales_of(code, scales));
        let tile = Tile { code, bytes, stride: row, rows: ROWS, cols: COLS, scales };
        decode_at(level, &tile, Float::BF16, Orientation::Straight, out, 2 * COLS);
    }
}

fn transpose(level: Level, memory: &mut Memory) {
    let Memory { codes, out, .. } = memory;
    let matrices = codes.chunks(2 * ROWS * COLS).zip(out.chunks_mut(2 * ROWS * COLS));
    for (from, to) in matrices {
        copy2d_at(level, 2, from, 2 * COLS, ROWS, COLS, Orientation::Transposed, to, 2 * ROWS);
    }
}

fn encode(level: Level, code: Code, memory: &mut Memory) {
    let Memory { numbers, scales, out, .. } = memory;
    let row = code.row_bytes(COLS);
    for (numbers, out) in numbers.chunks(ROWS * COLS).zip(out.chunks_mut(ROWS * row)) {
        let scales = scales_of(code, scales);
        encode_at(level, code, numbers, COLS, ROWS, COLS, Some(&scales), out, row);
    }
}
