//! SIMD kernels, and the dispatcher that chooses between them at run time.
//!
//! A [`Level`] stands for an instruction set that this machine was found to have. Its methods are
//! the dispatcher: each calls the kernel of the level, or the portable loop where the level has no
//! kernel. There are two kinds of kernels: table look-ups, transposes and copies written with
//! intrinsics, and portable loops that are compiled a second time with wider vectors. All of them
//! give the bits of the portable loop; the tests of [`codec`](super) compare every level of the
//! machine with the scalar reference.
//!
//! Almost all `unsafe` code of the crate is here (one system call in `mount/session.rs` is the
//! rest). It is sound for two reasons: kernels are called only through a `Level`, whose value
//! proves that the machine has the instructions, and kernels check the lengths of their slices
//! before they use pointers.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use super::encode::encode_row;
use super::float::Half;
use super::fp8::Fp8Table;
use super::rows::compute_rows;
use super::scratch::STRIP_OUT_ROW_BYTES;
use super::tile::{ScaleRun, ScaleRuns, SplitRuns};
use super::transpose::{copy_rows, transpose_in_l1};
use super::{Code, Scales, Tile, fp8, nibble};
use crate::tensor::Float;

/// An instruction set for the kernels. A value proves that this machine has the instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(InstructionSet);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InstructionSet {
    Portable,
    /// AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VBMI (Ice Lake, Zen 4), in addition to AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// Portable loops only, vectorised by the compiler for the target's baseline.
    pub const PORTABLE: Level = Level(InstructionSet::Portable);

    /// The fastest level of this machine.
    pub fn best() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                return Level(InstructionSet::Avx512);
            }
            if has_avx2() {
                return Level(InstructionSet::Avx2);
            }
        }
        Level::PORTABLE
    }

    /// All levels of this machine, slowest first.
    pub fn available() -> Vec<Level> {
        let levels = [
            Some(Level::PORTABLE),
            #[cfg(target_arch = "x86_64")]
            has_avx2().then_some(Level(InstructionSet::Avx2)),
            #[cfg(target_arch = "x86_64")]
            has_avx512().then_some(Level(InstructionSet::Avx512)),
        ];
        levels.into_iter().flatten().collect()
    }

    /// A name for logs and reports.
    pub fn name(self) -> &'static str {
        match self.0 {
            InstructionSet::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => "avx512",
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

/// Calls the kernel `$name` of a level, or evaluates `$portable` for the portable level.
macro_rules! kernel {
    ($level:expr, $portable:expr, $name:ident $(::<$w:ident>)? ($($arg:expr),*)) => {
        match $level.0 {
            InstructionSet::Portable => $portable,
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => {
                // SAFETY: a level of this kind is made only where its features were detected.
                unsafe { avx2::$name $(::<$w>)? ($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => {
                // SAFETY: a level of this kind is made only where its features were detected.
                unsafe { avx512::$name $(::<$w>)? ($($arg),*) }
            }
        }
    };
}

impl Level {
    /// Fills the table of one FP8 scale for [`Level::look_up`] of the same level.
    pub(super) fn fill_table(self, to: Half, scale: f32, table: &mut Fp8Table) {
        kernel!(self, fp8::fill_interleaved(to, scale, table), fill_table(to, scale, table));
    }

    /// Decodes FP8 codes into 16-bit floats by one table for each run of columns.
    ///
    /// # Panics
    /// If `out` has less than two bytes for each code.
    pub(super) fn look_up(
        self,
        tables: &[Fp8Table],
        runs: &ScaleRuns,
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

    /// Decodes FP8 codes into 16-bit floats and transposes them. `src` should be in the L1 cache;
    /// output rows have at most [`STRIP_OUT_ROW_BYTES`] bytes.
    ///
    /// # Panics
    /// If `src` or `out` is too short for the box.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn look_up_transposed(
        self,
        table: &Fp8Table,
        src: &[u8],
        stride: usize,
        rows: usize,
        cols: usize,
        out: &mut [u8],
        out_stride: usize,
    ) {
        #[cfg(target_arch = "x86_64")]
        if self.0 == InstructionSet::Avx512 {
            // SAFETY: a level of this kind is made only where its features were detected.
            return unsafe {
                avx512::look_up_transposed(table, src, stride, rows, cols, out, out_stride)
            };
        }
        // The codes are transposed, not the floats: they are half as many bytes.
        let mut codes = [0; STAGED_ROWS * STRIP_OUT_ROW_BYTES / 2];
        for col in (0..cols).step_by(STAGED_ROWS) {
            let wide = STAGED_ROWS.min(cols - col);
            self.transpose_in_cache::<1>(&src[col..], stride, rows, wide, &mut codes, rows);
            let (code, bytes) = (Code::E4M3, &codes[..]);
            let tile = Tile { code, bytes, stride: rows, rows: wide, cols: rows, scales: None };
            let out = &mut out[col * out_stride..];
            self.look_up(
                std::slice::from_ref(table),
                &ScaleRuns::single(rows),
                &tile,
                out,
                out_stride,
            );
        }
    }

    /// Decodes rows of 4-bit codes into 16-bit floats. `values` are the values of the 16 codes;
    /// every run starts at an even column.
    ///
    /// # Panics
    /// If the codes, the scales or `out` are too short for the runs.
    pub(super) fn look_up_nibbles(
        self,
        values: &[f32; 16],
        to: Half,
        tile: &Tile<'_>,
        runs: &SplitRuns,
        out: &mut [u8],
        out_stride: usize,
    ) {
        kernel!(
            self,
            nibble::look_up(values, to, tile, &runs.all, out, out_stride),
            look_up_nibbles(values, to, tile, runs, out, out_stride)
        );
    }

    /// Whether [`Level::look_up_nibble_column`] is faster than decoding whole rows. On the other
    /// levels, getting to a row costs as much as decoding 32 columns of it.
    pub(super) fn has_fast_nibble_columns(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == InstructionSet::Avx512;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Decodes at most 32 columns of 4-bit codes into 16-bit floats, one row to each item of `out`.
    /// The run starts at an even column.
    ///
    /// # Panics
    /// If a row of codes ends less than 32 columns after the start of the run, or the scales or
    /// `out` have too few rows.
    pub(super) fn look_up_nibble_column(
        self,
        values: &[f32; 16],
        to: Half,
        tile: &Tile<'_>,
        run: ScaleRun,
        out: &mut [[u8; 64]],
    ) {
        #[cfg(target_arch = "x86_64")]
        if self.0 == InstructionSet::Avx512 {
            // SAFETY: a level of this kind is made only where its features were detected.
            return unsafe { avx512::look_up_nibble_column(values, to, tile, run, out) };
        }
        let tile = tile.sub_tile(0, tile.rows, run.start, run.len);
        let runs = tile.scales().col_runs(run.len).split();
        self.look_up_nibbles(values, to, &tile, &runs, out.as_flattened_mut(), 64);
    }

    /// Transposes `rows` by `cols` elements of `W` bytes. `src` should be in the L1 cache; output
    /// rows have at most [`STRIP_OUT_ROW_BYTES`] bytes and are written with `non_temporal` stores
    /// if those are given.
    ///
    /// # Panics
    /// If `src` or `out` is too short for the box.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn transpose<const W: usize>(
        self,
        src: &[u8],
        stride: usize,
        rows: usize,
        cols: usize,
        out: &mut [u8],
        out_stride: usize,
        non_temporal: Option<&NonTemporalStores>,
    ) {
        self.write_rows(
            cols,
            rows * W,
            out,
            out_stride,
            non_temporal,
            |col, wide, out, out_stride| {
                self.transpose_in_cache::<W>(&src[col * W..], stride, rows, wide, out, out_stride);
            },
        );
    }

    /// Has `write` fill `rows` rows of `width` bytes, at most [`STRIP_OUT_ROW_BYTES`]. `write` gets
    /// the first row, the number of rows, a buffer and the buffer's row pitch. With `non_temporal`
    /// stores the buffer is a staging area of [`STAGED_ROWS`] rows; without, it is `out` itself.
    pub(super) fn write_rows(
        self,
        rows: usize,
        width: usize,
        out: &mut [u8],
        out_stride: usize,
        non_temporal: Option<&NonTemporalStores>,
        write: impl Fn(usize, usize, &mut [u8], usize),
    ) {
        let Some(non_temporal) = non_temporal else {
            return write(0, rows, out, out_stride);
        };
        let mut staged = StagedRows([0; STAGED_ROWS * STRIP_OUT_ROW_BYTES]);
        let staged = &mut staged.0;
        for row in (0..rows).step_by(STAGED_ROWS) {
            let high = STAGED_ROWS.min(rows - row);
            write(row, high, staged, STRIP_OUT_ROW_BYTES);
            let out = &mut out[row * out_stride..];
            non_temporal.copy(staged, STRIP_OUT_ROW_BYTES, high, width, out, out_stride);
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
        // Kernels transpose whole tiles only. What remains are the rows below them and the columns
        // to their right.
        if high < rows && wide > 0 {
            let (src, out) = (&src[high * stride..], &mut out[high * W..]);
            transpose_in_l1::<W>(src, stride, rows - high, wide, out, out_stride);
        }
        if wide < cols {
            let (src, out) = (&src[wide * W..], &mut out[wide * out_stride..]);
            transpose_in_l1::<W>(src, stride, rows, cols - wide, out, out_stride);
        }
    }

    /// Runs [`rows::compute_rows`](compute_rows()), compiled for the level.
    pub(super) fn compute_rows(
        self,
        tile: &Tile<'_>,
        to: Float,
        out: &mut [u8],
        out_stride: usize,
    ) {
        kernel!(
            self,
            compute_rows(tile, to, out, out_stride),
            compute_rows(tile, to, out, out_stride)
        );
    }

    /// Runs [`encode::encode_row`](encode_row()), compiled for the level.
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

    /// Copies `rows` rows of `width` bytes and, on SIMD levels, prefetches as many rows below them.
    ///
    /// # Panics
    /// If `src` or `out` is too short for the rows.
    pub(super) fn copy_and_prefetch(
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
            copy_rows(src, stride, rows, width, out, out_stride),
            copy_and_prefetch(src, stride, rows, width, out, out_stride)
        );
    }

    /// Prefetches `rows` rows of `cols` scales; the rows may end beyond `items`. Does nothing on
    /// the portable level.
    pub(super) fn prefetch(self, items: &[f32], stride: usize, rows: usize, cols: usize) {
        kernel!(self, _ = (items, stride, rows, cols), prefetch(items, stride, rows, cols));
    }

    /// Non-temporal stores for an output that spans `bytes` bytes; `None` if the output is small or
    /// the level is portable.
    ///
    /// An ordinary store first reads the old contents of its cache line from memory. The processor
    /// hides that latency for a few streams of ascending addresses, but a transposed strip writes
    /// to hundreds of rows.
    pub(super) fn non_temporal_stores(self, bytes: usize) -> Option<NonTemporalStores> {
        (self != Level::PORTABLE && bytes >= NON_TEMPORAL_MIN_BYTES)
            .then_some(NonTemporalStores(self))
    }
}

/// Outputs that span at least this many bytes are written with non-temporal stores.
///
/// A smaller output, such as a chunk of 1 MiB, is read again at once and should stay in the L2
/// cache. Measured: 1 MiB of FP8, decoded and transposed into a buffer that is reused, then copied,
/// takes 90 + 30 ms per GB with ordinary stores and 170 + 80 ms with non-temporal ones (2048 rows
/// of codes from the L3 cache, strips of 128 columns, AVX-512).
const NON_TEMPORAL_MIN_BYTES: usize = 4 << 20;

/// Permission to write with non-temporal stores, which bypass the caches. Dropping it executes a
/// store fence; only then may other threads read what was written.
pub(super) struct NonTemporalStores(Level);

impl NonTemporalStores {
    /// Copies `rows` rows of `width` bytes. Whole cache lines of the output bypass the caches.
    ///
    /// # Panics
    /// If `src` or `out` is too short for the rows.
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
            copy_rows(src, stride, rows, width, out, out_stride),
            copy_non_temporal(src, stride, rows, width, out, out_stride)
        );
    }
}

impl Drop for NonTemporalStores {
    fn drop(&mut self) {
        kernel!(self.0, (), fence());
    }
}

/// Output rows that are staged in the L1 cache before they are written with non-temporal stores.
const STAGED_ROWS: usize = 16;

/// Buffer for the staged rows, aligned to a cache line.
#[repr(align(64))]
struct StagedRows([u8; STAGED_ROWS * STRIP_OUT_ROW_BYTES]);

/// Whether `bytes` is long enough for `rows` rows of `cols` elements of `width` bytes, with rows
/// `stride` bytes apart.
#[cfg(target_arch = "x86_64")]
fn holds(bytes: &[u8], rows: usize, stride: usize, cols: usize, width: usize) -> bool {
    let last = rows.saturating_sub(1).checked_mul(stride);
    let end = cols.checked_mul(width).zip(last).and_then(|(row, last)| row.checked_add(last));
    end.is_some_and(|end| end <= bytes.len())
}
