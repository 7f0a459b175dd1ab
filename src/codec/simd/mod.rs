//! Kernels for particular instruction sets, chosen at run time.
//!
//! Every kernel equals the portable loop that it replaces, bit for bit; the tests of
//! [`codec`](super) run all levels of the machine against the reference. Two kinds live here:
//! look-ups and transposes written with intrinsics, and portable loops that are compiled once more
//! with wider vectors.
//!
//! This module and the memory map are the only places with `unsafe` code: a kernel is called only
//! through a [`Level`], whose value proves that the machine has the instructions, and checks the
//! extent of its slices before it works with pointers.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use super::encode::encode_row;
use super::float::Half;
use super::fp8::Table;
use super::rows::direct;
use super::scratch::STRIP_ROW_BYTES;
use super::tile::{Run, Runs, Split};
use super::transpose::{cached, copy};
use super::{Code, Scales, Tile, fp8, nibble};
use crate::tensor::Float;

/// Which instructions the kernels may use. A value proves that this machine has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Portable,
    /// AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VBMI (Ice Lake, Zen 4), and all of the level below.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// No kernels: loops that the compiler vectorises for the target's baseline.
    pub const PORTABLE: Level = Level(Kind::Portable);

    /// The fastest level of this machine.
    pub fn best() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                return Level(Kind::Avx512);
            }
            if has_avx2() {
                return Level(Kind::Avx2);
            }
        }
        Level::PORTABLE
    }

    /// Every level of this machine, slowest first. Tests run them all.
    pub fn available() -> Vec<Level> {
        let levels = [
            Some(Level::PORTABLE),
            #[cfg(target_arch = "x86_64")]
            has_avx2().then_some(Level(Kind::Avx2)),
            #[cfg(target_arch = "x86_64")]
            has_avx512().then_some(Level(Kind::Avx512)),
        ];
        levels.into_iter().flatten().collect()
    }

    /// A name for logs and reports.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vbmi")
}

/// Calls the kernel of a level, or evaluates what the portable level does.
macro_rules! kernel {
    ($level:expr, $portable:expr, $name:ident $(::<$w:ident>)? ($($arg:expr),*)) => {
        match $level.0 {
            Kind::Portable => $portable,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => {
                // SAFETY: a level of this kind is made only where its features were detected.
                unsafe { avx2::$name $(::<$w>)? ($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => {
                // SAFETY: a level of this kind is made only where its features were detected.
                unsafe { avx512::$name $(::<$w>)? ($($arg),*) }
            }
        }
    };
}

impl Level {
    /// Fills the table of one FP8 scale for [`Level::look_up`] of the same level.
    pub(super) fn table(self, to: Half, scale: f32, table: &mut Table) {
        kernel!(self, fp8::pairs(to, scale, table), table(to, scale, table));
    }

    /// FP8 codes to 16-bit floats, by a table for each run of columns.
    ///
    /// # Panics
    /// Where `out` does not hold two bytes for each code.
    pub(super) fn look_up(
        self,
        tables: &[Table],
        runs: &Runs,
        tile: &Tile<'_>,
        out: &mut [u8],
        out_stride: usize,
    ) {
        kernel!(
            self,
            fp8::look_up(tables, runs, tile, out, out_stride),
            look_up(tables, runs, tile, out, out_stride)
        );
    }

    /// FP8 codes to 16-bit floats, transposed, rows of at most [`STRIP_ROW_BYTES`] in the output;
    /// `src` lies in the cache.
    ///
    /// # Panics
    /// Where `src` or `out` does not hold the box.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn look_up_transposed(
        self,
        table: &Table,
        src: &[u8],
        stride: usize,
        rows: usize,
        cols: usize,
        out: &mut [u8],
        out_stride: usize,
    ) {
        #[cfg(target_arch = "x86_64")]
        if self.0 == Kind::Avx512 {
            // SAFETY: a level of this kind is made only where its features were detected.
            return unsafe {
                avx512::look_up_transposed(table, src, stride, rows, cols, out, out_stride)
            };
        }
        // Codes are half the bytes of what they become: they are transposed first.
        let mut codes = [0; LINES * STRIP_ROW_BYTES / 2];
        for col in (0..cols).step_by(LINES) {
            let wide = LINES.min(cols - col);
            self.transpose_in_cache::<1>(&src[col..], stride, rows, wide, &mut codes, rows);
            let (code, bytes) = (Code::E4M3, &codes[..]);
            let tile = Tile { code, bytes, stride: rows, rows: wide, cols: rows, scales: None };
            let out = &mut out[col * out_stride..];
            self.look_up(std::slice::from_ref(table), &Runs::one(rows), &tile, out, out_stride);
        }
    }

    /// Rows of nibbles to 16-bit floats; `values` are the numbers of the codes, and every run
    /// starts at an even column.
    ///
    /// # Panics
    /// Where the codes, the scales or `out` do not hold the runs.
    pub(super) fn nibbles(
        self,
        values: &[f32; 16],
        to: Half,
        tile: &Tile<'_>,
        runs: &Split,
        out: &mut [u8],
        out_stride: usize,
    ) {
        kernel!(
            self,
            nibble::look_up(values, to, tile, &runs.all, out, out_stride),
            nibbles(values, to, tile, runs, out, out_stride)
        );
    }

    /// Whether [`Level::nibble_column`] is faster than whole rows: the other levels spend as much
    /// on getting to a row as on 32 columns of it.
    pub(super) fn takes_nibble_columns(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Kind::Avx512;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// A run of at most 32 columns of nibbles, from an even one on, to 16-bit floats, a row to an
    /// item of `out`.
    ///
    /// # Panics
    /// Where the codes do not hold 32 columns, or the scales or `out` not the rows.
    pub(super) fn nibble_column(
        self,
        values: &[f32; 16],
        to: Half,
        tile: &Tile<'_>,
        run: Run,
        out: &mut [[u8; 64]],
    ) {
        #[cfg(target_arch = "x86_64")]
        if self.0 == Kind::Avx512 {
            // SAFETY: a level of this kind is made only where its features were detected.
            return unsafe { avx512::nibble_column(values, to, tile, run, out) };
        }
        let tile = tile.cut(0, tile.rows, run.start, run.len);
        let runs = tile.scales().col_runs(run.len).split();
        self.nibbles(values, to, &tile, &runs, out.as_flattened_mut(), 64);
    }

    /// Transposes `rows` by `cols` elements of `W` bytes, rows of at most [`STRIP_ROW_BYTES`] in
    /// the output; `src` lies in the cache, and `out` is written through `stream` where there is
    /// one.
    ///
    /// # Panics
    /// Where `src` or `out` does not hold the box.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn transpose<const W: usize>(
        self,
        src: &[u8],
        stride: usize,
        rows: usize,
        cols: usize,
        out: &mut [u8],
        out_stride: usize,
        stream: Option<&Stream>,
    ) {
        self.lines(cols, rows * W, out, out_stride, stream, |col, wide, out, out_stride| {
            self.transpose_in_cache::<W>(&src[col * W..], stride, rows, wide, out, out_stride);
        });
    }

    /// Writes `rows` rows of `width` bytes, at most [`STRIP_ROW_BYTES`], by way of `write`, which
    /// is given the first row, their number, and where they go; through `stream` where there is
    /// one.
    pub(super) fn lines(
        self,
        rows: usize,
        width: usize,
        out: &mut [u8],
        out_stride: usize,
        stream: Option<&Stream>,
        write: impl Fn(usize, usize, &mut [u8], usize),
    ) {
        let Some(stream) = stream else {
            return write(0, rows, out, out_stride);
        };
        let mut lines = Lines([0; LINES * STRIP_ROW_BYTES]);
        let lines = &mut lines.0;
        for row in (0..rows).step_by(LINES) {
            let high = LINES.min(rows - row);
            write(row, high, lines, STRIP_ROW_BYTES);
            let out = &mut out[row * out_stride..];
            stream.copy(lines, STRIP_ROW_BYTES, high, width, out, out_stride);
        }
    }

    fn transpose_in_cache<const W: usize>(
        self,
        src: &[u8],
        stride: usize,
        rows: usize,
        cols: usize,
        out: &mut [u8],
        out_stride: usize,
    ) {
        let (high, wide) =
            kernel!(self, (0, 0), transpose::<W>(src, stride, rows, cols, out, out_stride));
        // The kernels leave the edges: rows below what they did, then columns to the right of it.
        if high < rows && wide > 0 {
            let (src, out) = (&src[high * stride..], &mut out[high * W..]);
            cached::<W>(src, stride, rows - high, wide, out, out_stride);
        }
        if wide < cols {
            let (src, out) = (&src[wide * W..], &mut out[wide * out_stride..]);
            cached::<W>(src, stride, rows, cols - wide, out, out_stride);
        }
    }

    /// [`rows::direct`](direct()), vectorised for the level.
    pub(super) fn direct(self, tile: &Tile<'_>, to: Float, out: &mut [u8], out_stride: usize) {
        kernel!(self, direct(tile, to, out, out_stride), direct(tile, to, out, out_stride));
    }

    /// [`encode::encode_row`](encode_row()), vectorised for the level.
    pub(super) fn encode_row(
        self,
        code: Code,
        values: &[f32],
        scales: &Scales<'_>,
        row_scales: &[f32],
        out: &mut [u8],
    ) {
        kernel!(
            self,
            encode_row(code, values, scales, row_scales, out),
            encode_row(code, values, scales, row_scales, out)
        );
    }

    /// Copies `rows` runs of `width` bytes into the cache, and tells the processor that as many
    /// runs below them are read soon.
    ///
    /// # Panics
    /// Where `src` or `out` does not hold the runs.
    pub(super) fn fetch(
        self,
        src: &[u8],
        stride: usize,
        rows: usize,
        width: usize,
        out: &mut [u8],
        out_stride: usize,
    ) {
        kernel!(
            self,
            copy(src, stride, rows, width, out, out_stride),
            fetch(src, stride, rows, width, out, out_stride)
        );
    }

    /// Tells the processor that `rows` runs of `cols` numbers are read soon, as far as they are in
    /// `items`.
    pub(super) fn prefetch(self, items: &[f32], stride: usize, rows: usize, cols: usize) {
        kernel!(self, _ = (items, stride, rows, cols), prefetch(items, stride, rows, cols));
    }

    /// A way past the caches for an output that spans `bytes` bytes, where that pays and the level
    /// has one.
    ///
    /// A plain store waits until the old contents of its cache line have come from memory. The
    /// processor hides that for a few streams of rising addresses, but a transposed strip writes
    /// into hundreds of rows.
    pub(super) fn stream(self, bytes: usize) -> Option<Stream> {
        (self != Level::PORTABLE && bytes >= STREAMED).then_some(Stream(self))
    }
}

/// Bytes that an output spans from which on it is written past the caches.
///
/// A smaller one, a chunk, stays in the second cache for whoever asked for it and reads it at once:
/// 1 MiB of FP8 decoded transposed into a buffer that is used again, then copied, takes 90 + 30 ms
/// a GB this way and 170 + 80 ms past the caches (2048 rows of codes from the third cache, strips
/// of 128 columns, AVX-512).
const STREAMED: usize = 4 << 20;

/// A way past the caches. Other threads may read what went through it once it is dropped.
pub(super) struct Stream(Level);

impl Stream {
    /// Copies `rows` runs of `width` bytes, whole cache lines of the output past the caches.
    ///
    /// # Panics
    /// Where `src` or `out` does not hold the runs.
    pub(super) fn copy(
        &self,
        src: &[u8],
        stride: usize,
        rows: usize,
        width: usize,
        out: &mut [u8],
        out_stride: usize,
    ) {
        kernel!(
            self.0,
            copy(src, stride, rows, width, out, out_stride),
            stream(src, stride, rows, width, out, out_stride)
        );
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        kernel!(self.0, (), fence());
    }
}

/// Rows of a transposed strip that are written past the caches together.
const LINES: usize = 16;

/// Those rows, while they are in the cache.
#[repr(align(64))]
struct Lines([u8; LINES * STRIP_ROW_BYTES]);

/// Whether `bytes` holds `rows` rows of `cols` elements of `width` bytes, rows `stride` bytes apart.
#[cfg(target_arch = "x86_64")]
fn holds(bytes: &[u8], rows: usize, stride: usize, cols: usize, width: usize) -> bool {
    let last = rows.saturating_sub(1).checked_mul(stride);
    let end = cols.checked_mul(width).zip(last).and_then(|(row, last)| row.checked_add(last));
    end.is_some_and(|end| end <= bytes.len())
}
