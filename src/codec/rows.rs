//! Decoding of rows as they lie: by a table where a scale serves enough elements, else by
//! arithmetic.

use std::ops::Range;

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

/// Rows that share a scale from which on the next scales are asked for ahead of time: where fewer
/// do, scales are a stream of memory next to the codes.
const FEW_ROWS: usize = 8;

/// Decodes rows into floats of one type.
pub(super) struct Rows<'a> {
    pub level: Level,
    pub to: Float,
    /// Rows by which the codes that are asked for are ahead of those that are decoded; 0 where the
    /// processor finds them itself, because whole rows are read.
    pub ahead: usize,
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
    /// Writes bytes `at..at + len` of row `row` by way of `decode`.
    #[inline(always)]
    fn write(&mut self, row: usize, at: usize, len: usize, decode: impl FnOnce(&mut [u8])) {
        match self {
            Target::Memory { out, stride } => decode(&mut out[row * *stride + at..][..len]),
            Target::Stream { stream, stage, out, stride } => {
                decode(&mut stage[..len]);
                stream.copy(stage, len, 1, len, &mut out[row * *stride + at..], *stride);
            }
        }
    }
}

/// How a row is decoded.
#[derive(Clone, Copy)]
enum Way {
    Tables,
    Nibbles(Half, &'static [f32; 16]),
    Direct,
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
        let (level, to, width) = (self.level, self.to, self.to.bytes());
        let scales = tile.scales.unwrap_or(Scales::ONE);
        let runs = scales.col_runs(tile.cols).split();
        let ahead = (self.ahead > 0).then(|| Ahead::new(self.ahead, tile, &scales));
        for rows in scales.row_runs(tile.rows) {
            let row_scales = &scales.values[rows.index * scales.stride..];
            let way = self.way(tile, &scales, rows.len);
            if let (Way::Tables, Some(to)) = (way, Half::of(to)) {
                for (run, table) in runs.all.clone().zip(&mut *self.tables) {
                    level.table(to, row_scales[run.index], table);
                }
            }
            if let Some(ahead) = &ahead {
                level.prefetch(ahead.scales(&scales, rows.index));
            }
            for row in rows.start..rows.start + rows.len {
                if let Some(ahead) = &ahead {
                    level.prefetch(ahead.codes(tile, row));
                }
                let codes = tile.row(row);
                target.write(row, col * width, tile.cols * width, |out| match way {
                    Way::Tables => {
                        for (run, table) in runs.all.clone().zip(&*self.tables) {
                            let codes = &codes[run.start..][..run.len];
                            level.look_up(table, codes, &mut out[2 * run.start..]);
                        }
                    }
                    Way::Nibbles(to, values) => {
                        level.nibbles(values, to, codes, &runs, row_scales, out);
                    }
                    Way::Direct => level.direct(tile.code, codes, to, &scales, row_scales, out),
                });
            }
        }
    }

    /// How to decode `rows` rows that share their scales.
    fn way(&self, tile: &Tile<'_>, scales: &Scales<'_>, rows: usize) -> Way {
        let Some(to) = Half::of(self.to) else {
            return Way::Direct;
        };
        let served = scales.block[1].min(tile.cols);
        let runs_are_even = (scales.block[1] | scales.phase[1]).is_multiple_of(2);
        let nibbles = |nibble: Nibble| {
            let worth = served >= WORTH_SIXTEEN && runs_are_even;
            if worth { Way::Nibbles(to, nibble.values()) } else { Way::Direct }
        };
        match tile.code {
            Code::E4M3 if served * rows >= WORTH_A_TABLE => Way::Tables,
            Code::E2M1 => nibbles(Nibble::E2M1),
            Code::Int4 => nibbles(Nibble::Int4),
            Code::E4M3 | Code::BF16 | Code::F16 | Code::F32 => Way::Direct,
        }
    }
}

/// What is asked for ahead of its use.
struct Ahead {
    /// Rows from the one that is decoded to the one whose codes are asked for.
    rows: usize,
    /// Rows of scales from those in use to those that are asked for, or `None` where so many rows
    /// share a scale that it does not pay.
    blocks: Option<usize>,
    /// Columns of scales.
    scales: Range<usize>,
}

impl Ahead {
    fn new(rows: usize, tile: &Tile<'_>, scales: &Scales<'_>) -> Ahead {
        let blocks = (scales.block[0] < FEW_ROWS).then(|| rows / scales.block[0]);
        let first = scales.phase[1] / scales.block[1];
        let last = (scales.phase[1] + tile.cols - 1) / scales.block[1];
        Ahead { rows, blocks, scales: first..last + 1 }
    }

    /// Codes of a row further down, empty where the tile's bytes end before.
    fn codes<'a>(&self, tile: &Tile<'a>, row: usize) -> &'a [u8] {
        let bytes = tile.bytes.get((row + self.rows) * tile.stride..).unwrap_or(&[]);
        &bytes[..tile.code.row_bytes(tile.cols).min(bytes.len())]
    }

    /// Scales of a row of scales further down, empty where there is none.
    fn scales<'a>(&self, scales: &Scales<'a>, index: usize) -> &'a [f32] {
        self.blocks
            .and_then(|blocks| scales.values.get((index + blocks) * scales.stride..))
            .and_then(|values| values.get(self.scales.clone()))
            .unwrap_or(&[])
    }
}

/// Numbers that are in flight between unpacking, scaling and rounding: 1 KiB.
const LANES: usize = 256;

/// A row of any code to any float, by arithmetic.
#[inline(always)]
pub(super) fn direct(
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
