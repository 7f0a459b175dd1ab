//! Decoding of rows as they lie: by a table where a scale serves enough elements, else by
//! arithmetic.

use super::float::{self, Half};
use super::fp8::{self, Table};
use super::nibble::{self, Nibble};
use super::scratch::TABLES;
use super::simd::Stream;
use super::tile::Scales;
use super::{Code, Level, Tile};
use crate::tensor::Float;

/// Columns that are decoded at a time: a row of them stays in the L1 cache, and so do the tables of
/// FP8 blocks of 128 columns.
const BAND: usize = 4096;

/// Elements that the table of a scale must serve to pay for its 256 entries (FP8).
const WORTH_A_TABLE: usize = 512;

/// Elements that the table of a scale must serve to pay for its 16 entries (nibbles).
const WORTH_SIXTEEN: usize = 16;

/// Decodes rows into floats of one type.
pub(super) struct Rows<'a> {
    pub level: Level,
    pub to: Float,
    pub tables: &'a mut [Table; TABLES],
}

/// Where decoded rows go.
pub(super) enum Target<'a> {
    /// To memory, `stride` bytes apart.
    Memory { out: &'a mut [u8], stride: usize },
    /// To memory past the caches, by way of a row in the L1 cache.
    Stream { stream: Stream, stage: &'a mut [u8], out: &'a mut [u8], stride: usize },
}

impl Target<'_> {
    /// Writes rows of `len` bytes, the first at byte `at`, by way of `decode`.
    fn write(
        &mut self,
        tile: &Tile<'_>,
        row: usize,
        at: usize,
        len: usize,
        decode: impl Fn(&Tile<'_>, &mut [u8], usize),
    ) {
        match self {
            Target::Memory { out, stride } => decode(tile, &mut out[row * *stride + at..], *stride),
            Target::Stream { stream, stage, out, stride } => {
                for i in 0..tile.rows {
                    decode(&tile.cut(i, 1, 0, tile.cols), &mut stage[..len], len);
                    stream.copy(stage, len, 1, len, &mut out[(row + i) * *stride + at..], *stride);
                }
            }
        }
    }
}

/// How rows are decoded.
#[derive(Clone, Copy)]
pub(super) enum Way {
    Tables(Half),
    Nibbles(Half, &'static [f32; 16]),
    Direct,
}

impl Way {
    /// How to decode the rows of a tile.
    pub(super) fn of(tile: &Tile<'_>, to: Float) -> Way {
        let scales = tile.scales();
        let Some(to) = Half::of(to) else {
            return Way::Direct;
        };
        let served = scales.block[1].min(tile.cols);
        let runs_are_even = (scales.block[1] | scales.phase[1]).is_multiple_of(2);
        let nibbles = |nibble: Nibble| {
            let worth = served >= WORTH_SIXTEEN && runs_are_even;
            if worth { Way::Nibbles(to, nibble.values()) } else { Way::Direct }
        };
        match tile.code {
            Code::E4M3 if served * scales.block[0].min(tile.rows) >= WORTH_A_TABLE => {
                Way::Tables(to)
            }
            Code::E2M1 => nibbles(Nibble::E2M1),
            Code::Int4 => nibbles(Nibble::Int4),
            Code::E4M3 | Code::BF16 | Code::F16 | Code::F32 => Way::Direct,
        }
    }
}

impl Rows<'_> {
    /// Decodes the rows of a tile.
    pub(super) fn decode(&mut self, tile: &Tile<'_>, target: &mut Target<'_>) {
        let band = match (tile.code, tile.scales) {
            // A phase may add one block to those that fill the band.
            (Code::E4M3, Some(scales)) => scales.block[1].saturating_mul(TABLES - 1).min(BAND),
            _ => BAND,
        };
        for col in (0..tile.cols).step_by(band) {
            self.band(&tile.cut(0, tile.rows, col, band.min(tile.cols - col)), col, target);
        }
    }

    fn band(&mut self, tile: &Tile<'_>, col: usize, target: &mut Target<'_>) {
        let (level, to) = (self.level, self.to);
        let scales = tile.scales();
        let (at, len) = (col * to.bytes(), tile.cols * to.bytes());
        match Way::of(tile, to) {
            Way::Tables(to) => {
                let runs = scales.col_runs(tile.cols);
                for rows in scales.row_runs(tile.rows) {
                    let row_scales = &scales.values[rows.index * scales.stride..];
                    for (run, table) in runs.clone().zip(&mut *self.tables) {
                        level.table(to, row_scales[run.index], table);
                    }
                    let tile = tile.cut(rows.start, rows.len, 0, tile.cols);
                    target.write(&tile, rows.start, at, len, |tile, out, stride| {
                        level.look_up(self.tables, &runs, tile, out, stride);
                    });
                }
            }
            Way::Nibbles(to, values) => {
                let runs = scales.col_runs(tile.cols).split();
                target.write(tile, 0, at, len, |tile, out, stride| {
                    level.nibbles(values, to, tile, &runs, out, stride);
                });
            }
            Way::Direct => target.write(tile, 0, at, len, |tile, out, stride| {
                level.direct(tile, to, out, stride);
            }),
        }
    }
}

/// Numbers that are in flight between unpacking, scaling and rounding: 1 KiB.
const LANES: usize = 256;

/// Calls `decode` with the codes of every row, the row of scales that serves it, and its output of
/// `width` bytes for each column. For kernels, which are compiled around it.
#[inline(always)]
pub(super) fn each(
    tile: &Tile<'_>,
    width: usize,
    out: &mut [u8],
    out_stride: usize,
    mut decode: impl FnMut(&[u8], &[f32], &mut [u8]),
) {
    let scales = tile.scales();
    for rows in scales.row_runs(tile.rows) {
        let row_scales = &scales.values[rows.index * scales.stride..];
        for row in rows.start..rows.start + rows.len {
            let out = &mut out[row * out_stride..][..tile.cols * width];
            decode(tile.row(row), row_scales, out);
        }
    }
}

/// Rows of any code to any float, by arithmetic.
#[inline(always)]
pub(super) fn direct(tile: &Tile<'_>, to: Float, out: &mut [u8], out_stride: usize) {
    let scales = tile.scales();
    each(tile, to.bytes(), out, out_stride, |codes, row_scales, out| {
        direct_row(tile.code, codes, to, &scales, row_scales, out);
    });
}

#[inline(always)]
fn direct_row(
    code: Code,
    codes: &[u8],
    to: Float,
    scales: &Scales<'_>,
    row_scales: &[f32],
    out: &mut [u8],
) {
    let mut lanes = [0.0; LANES];
    for (i, out) in out.chunks_mut(LANES * to.bytes()).enumerate() {
        let (col, lanes) = (i * LANES, &mut lanes[..out.len() / to.bytes()]);
        unpack(code, codes, col, lanes);
        for run in scales.from(0, col).col_runs(lanes.len()) {
            for x in &mut lanes[run.start..run.start + run.len] {
                *x *= row_scales[run.index];
            }
        }
        float::store(to, lanes, out);
    }
}

/// The numbers of columns `col..col + out.len()` of a row, unscaled; `col` is even.
#[inline(always)]
fn unpack(code: Code, row: &[u8], col: usize, out: &mut [f32]) {
    match code {
        Code::E4M3 => fp8::unpack(&row[col..], out),
        Code::E2M1 => nibbles(Nibble::E2M1, &row[col / 2..], out),
        Code::Int4 => nibbles(Nibble::Int4, &row[col / 2..], out),
        Code::BF16 => float::load(Float::BF16, &row[2 * col..], out),
        Code::F16 => float::load(Float::F16, &row[2 * col..], out),
        Code::F32 => float::load(Float::F32, &row[4 * col..], out),
    }
}

#[inline(always)]
fn nibbles(nibble: Nibble, bytes: &[u8], out: &mut [f32]) {
    let mut codes = [0; LANES];
    let codes = &mut codes[..out.len()];
    nibble::unpack(bytes, codes);
    nibble.numbers(codes, out);
}
