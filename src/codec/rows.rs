//! Row-major decoding of a tile.
//!
//! There are two ways to decode: look-up in a table of all codes under one scale, which pays off
//! where a scale covers enough elements, and arithmetic on each element. [`DecodeMethod::of`]
//! chooses; [`RowDecoder`] runs the choice one panel of columns at a time.

use super::float::{self, Half};
use super::fp8::{self, Fp8Table};
use super::nibble::{self, Nibble};
use super::scratch::MAX_TABLES;
use super::simd::NonTemporalStores;
use super::tile::Scales;
use super::{Code, Level, Tile};
use crate::tensor::Float;

/// Columns of a panel, the part of a tile that is decoded at a time. One decoded row of a panel
/// stays in the L1 cache, and so do the 32 tables of its FP8 blocks of 128 columns.
const PANEL_COLS: usize = 4096;

/// FP8: a scale block of at least this many elements is decoded by a table. Smaller blocks do not
/// repay the filling of its 256 entries.
const FP8_TABLE_MIN_ELEMENTS: usize = 512;

/// 4-bit codes: a scale group of at least this many elements is decoded by a table. Smaller groups
/// do not repay the filling of its 16 entries.
const NIBBLE_TABLE_MIN_ELEMENTS: usize = 16;

/// Decodes rows into floats of type `to`.
pub(super) struct RowDecoder<'a> {
    pub level: Level,
    pub to: Float,
    /// Memory for the tables of the scale blocks of a panel.
    pub tables: &'a mut [Fp8Table; MAX_TABLES],
}

/// Destination of decoded rows, which lie `stride` bytes apart in `out`.
pub(super) enum RowOutput<'a> {
    /// Rows are decoded straight into `out`.
    Memory { out: &'a mut [u8], stride: usize },
    /// Each row is decoded into `staging`, which stays in the L1 cache, and copied to `out` with
    /// non-temporal stores.
    NonTemporal {
        non_temporal: NonTemporalStores,
        staging: &'a mut [u8],
        out: &'a mut [u8],
        stride: usize,
    },
}

impl RowOutput<'_> {
    /// Has `decode` write the rows of `tile`: `len` bytes each, from byte `at` of output row `row`
    /// and those below. `decode` gets a tile, the output and the output's row pitch.
    fn write(
        &mut self,
        tile: &Tile<'_>,
        row: usize,
        at: usize,
        len: usize,
        decode: impl Fn(&Tile<'_>, &mut [u8], usize),
    ) {
        match self {
            RowOutput::Memory { out, stride } => {
                decode(tile, &mut out[row * *stride + at..], *stride)
            }
            RowOutput::NonTemporal { non_temporal, staging, out, stride } => {
                for i in 0..tile.rows {
                    decode(&tile.sub_tile(i, 1, 0, tile.cols), &mut staging[..len], len);
                    let out = &mut out[(row + i) * *stride + at..];
                    non_temporal.copy(staging, len, 1, len, out, *stride);
                }
            }
        }
    }
}

/// How the codes of a tile become floats.
#[derive(Clone, Copy)]
pub(super) enum DecodeMethod {
    /// FP8 by a table of 256 results for each scale block.
    ByteTable(Half),
    /// 4-bit codes by a table of 16 results for each scale group; the values of the 16 codes.
    NibbleTable(Half, &'static [f32; 16]),
    /// Each element is unpacked, multiplied by its scale and rounded.
    Arithmetic,
}

impl DecodeMethod {
    /// The method that is fastest for `tile`; all methods give the same bits.
    pub(super) fn of(tile: &Tile<'_>, to: Float) -> DecodeMethod {
        let scales = tile.scales();
        let Some(to) = Half::of(to) else {
            return DecodeMethod::Arithmetic;
        };
        let cols_per_scale = scales.block[1].min(tile.cols);
        let runs_are_even = (scales.block[1] | scales.phase[1]).is_multiple_of(2);
        let nibbles = |nibble: Nibble| {
            if cols_per_scale >= NIBBLE_TABLE_MIN_ELEMENTS && runs_are_even {
                DecodeMethod::NibbleTable(to, nibble.values())
            } else {
                DecodeMethod::Arithmetic
            }
        };
        match tile.code {
            Code::E4M3
                if cols_per_scale * scales.block[0].min(tile.rows) >= FP8_TABLE_MIN_ELEMENTS =>
            {
                DecodeMethod::ByteTable(to)
            }
            Code::E2M1 => nibbles(Nibble::E2M1),
            Code::Int4 => nibbles(Nibble::Int4),
            Code::E4M3 | Code::BF16 | Code::F16 | Code::F32 => DecodeMethod::Arithmetic,
        }
    }
}

impl RowDecoder<'_> {
    /// Decodes the rows of a tile.
    pub(super) fn decode(&mut self, tile: &Tile<'_>, output: &mut RowOutput<'_>) {
        let panel_cols = match (tile.code, tile.scales) {
            // A panel that starts inside a scale block touches one block more than it could fill.
            (Code::E4M3, Some(scales)) => {
                scales.block[1].saturating_mul(MAX_TABLES - 1).min(PANEL_COLS)
            }
            _ => PANEL_COLS,
        };
        for col in (0..tile.cols).step_by(panel_cols) {
            let cols = panel_cols.min(tile.cols - col);
            self.decode_panel(&tile.sub_tile(0, tile.rows, col, cols), col, output);
        }
    }

    /// Decodes one panel, whose first column is column `col` of the output.
    fn decode_panel(&mut self, tile: &Tile<'_>, col: usize, output: &mut RowOutput<'_>) {
        let (level, to) = (self.level, self.to);
        let scales = tile.scales();
        let (at, len) = (col * to.bytes(), tile.cols * to.bytes());
        match DecodeMethod::of(tile, to) {
            DecodeMethod::ByteTable(to) => {
                let runs = scales.col_runs(tile.cols);
                for rows in scales.row_runs(tile.rows) {
                    let row_scales = &scales.values[rows.index * scales.stride..];
                    for (run, table) in runs.clone().zip(&mut *self.tables) {
                        level.fill_table(to, row_scales[run.index], table);
                    }
                    let tile = tile.sub_tile(rows.start, rows.len, 0, tile.cols);
                    output.write(&tile, rows.start, at, len, |tile, out, stride| {
                        level.look_up(self.tables, &runs, tile, out, stride);
                    });
                }
            }
            DecodeMethod::NibbleTable(to, values) => {
                let runs = scales.col_runs(tile.cols).split();
                output.write(tile, 0, at, len, |tile, out, stride| {
                    level.look_up_nibbles(values, to, tile, &runs, out, stride);
                });
            }
            DecodeMethod::Arithmetic => output.write(tile, 0, at, len, |tile, out, stride| {
                level.compute_rows(tile, to, out, stride);
            }),
        }
    }
}

/// Elements that are unpacked, scaled and rounded at a time: 1 KiB of `f32`.
const LANES: usize = 256;

/// Calls `decode` for every row, with its codes, its row of scales and its output, which has
/// `width` bytes for each column.
///
/// Inlined into the kernels, so that it is compiled with their instructions.
#[inline(always)]
pub(super) fn for_each_row(
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

/// Decodes rows of any code into any float type by arithmetic.
#[inline(always)]
pub(super) fn compute_rows(tile: &Tile<'_>, to: Float, out: &mut [u8], out_stride: usize) {
    let scales = tile.scales();
    for_each_row(tile, to.bytes(), out, out_stride, |codes, row_scales, out| {
        compute_row(tile.code, codes, to, &scales, row_scales, out);
    });
}

#[inline(always)]
fn compute_row(
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
        for run in scales.offset_by(0, col).col_runs(lanes.len()) {
            for x in &mut lanes[run.start..run.start + run.len] {
                *x *= row_scales[run.index];
            }
        }
        float::store(to, lanes, out);
    }
}

/// The unscaled values of columns `col..col + out.len()` of a row; `col` is even.
#[inline(always)]
fn unpack(code: Code, row: &[u8], col: usize, out: &mut [f32]) {
    match code {
        Code::E4M3 => fp8::to_f32(&row[col..], out),
        Code::E2M1 => unpack_nibbles(Nibble::E2M1, &row[col / 2..], out),
        Code::Int4 => unpack_nibbles(Nibble::Int4, &row[col / 2..], out),
        Code::BF16 => float::load(Float::BF16, &row[2 * col..], out),
        Code::F16 => float::load(Float::F16, &row[2 * col..], out),
        Code::F32 => float::load(Float::F32, &row[4 * col..], out),
    }
}

#[inline(always)]
fn unpack_nibbles(nibble: Nibble, bytes: &[u8], out: &mut [f32]) {
    let mut codes = [0; LANES];
    let codes = &mut codes[..out.len()];
    nibble::unpack(bytes, codes);
    nibble.to_f32(codes, out);
}
