//! Decodes one chunk of a computed tensor: dequantizes, casts or moves every fragment that overlaps
//! it.
//!
//! ```text
//! chunk ── fragments of its plane ── BoxCopy (box of a matrix -> box of the chunk)
//!            ├── dense in the matrix ── decode_box, directly into the chunk
//!            └── strided ── decode_box around it into a buffer, elements picked from there
//! decode_box: source bytes by pread, or from cached source rows (narrow strips of transposed
//!             matrices); then codec kernels with the scales of the box
//! ```

use crate::tensor::{to_u64, to_usize};
use std::cell::RefCell;
use std::sync::Arc;

use super::box_copy::{BoxCopy, StridedRange, copies_into_chunk};
use super::counters::{Counters, add};
use super::source_rows::{Panel, SourceRows, SourceWidth};
use crate::codec::{Code, Orientation, Scales, Tile, copy2d, decode, scale_to_f32};
use crate::plan::{ChunkBox, Computed, Grid, Matrix, MatrixId, MatrixScales, ScaleBand};
use crate::source::{Checkpoint, SourceId, SourceReadError};
use crate::tensor::{DType, Float, Shape};

/// Buffers of a thread, reused from chunk to chunk.
#[derive(Default)]
struct DecodeBuffers {
    /// Source bytes of a box.
    payload: Vec<u8>,
    /// Scales of a box, as stored.
    scale_bytes: Vec<u8>,
    /// Scales of a box.
    scales: Vec<f32>,
    /// The dense box around a strided one, decoded.
    decoded: Vec<u8>,
}

thread_local! {
    static BUFFERS: RefCell<DecodeBuffers> = RefCell::default();
}

/// Why a chunk could not be decoded or encoded; cloned for all who wait for it.
#[derive(Clone, Debug)]
pub(super) enum DecodeError {
    /// The source failed.
    Source(Arc<SourceReadError>),
    /// The thread that was reading the source rows of this chunk panicked.
    Abandoned,
}

impl From<SourceReadError> for DecodeError {
    fn from(error: SourceReadError) -> DecodeError {
        DecodeError::Source(Arc::new(error))
    }
}

/// The source columns that produce the first 8 MiB of a plane are cached as a panel of their own. A
/// reader of some experts makes the kernel prefetch up to 8 MiB (two windows of 4 MiB) into the
/// next expert; only the leading columns of that expert are then read from the source.
pub(super) const LEADING_PANEL_BYTES: u64 = 8 << 20;

/// The number of leading columns is a multiple of this: of the scale block of every scheme, and of
/// whole bytes.
const LEADING_COLUMN_MULTIPLE: u64 = 128;

/// Decodes chunks: the source, the cache of its rows, and how to use them.
#[derive(Clone, Copy)]
pub(super) struct ChunkDecoder<'a> {
    pub checkpoint: &'a Checkpoint,
    pub counters: &'a Counters,
    /// Cached rows of matrices that the view shows transposed.
    pub source_rows: &'a SourceRows,
    /// How much of each such row to read and cache.
    pub source_width: SourceWidth,
    /// The only bytes of each row of the chunk that are needed (first, end); `None` for all.
    pub bytes: Option<(u64, u64)>,
}

impl ChunkDecoder<'_> {
    /// Fills `out` with the rows `chunk` of a tensor.
    ///
    /// # Errors
    /// The error of the source.
    pub(super) fn fill<'m>(
        &self,
        computed: &Computed,
        matrix_of: impl Fn(MatrixId) -> &'m Matrix,
        shape: &Shape,
        dtype: DType,
        chunk: ChunkBox,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let element = to_usize(u64::from(dtype.bits() / 8));
        let row_bytes = to_usize(computed.grid.row_bytes);
        let lead = leading_columns(&computed.grid);
        let needed = |p: &BoxCopy| {
            let end = p.to_cols.start + p.to_cols.step * (p.to_cols.count - 1) + 1;
            let bytes = (p.to_cols.start * to_u64(element), end * to_u64(element));
            self.bytes.is_none_or(|(start, end)| bytes.0 < end && start < bytes.1)
        };
        BUFFERS.with_borrow_mut(|buffers| {
            for fragment in computed.fragments_of(chunk.plane) {
                let matrix = matrix_of(fragment.matrix);
                for p in
                    copies_into_chunk(fragment, matrix, shape, chunk).iter().filter(|p| needed(p))
                {
                    let mut out = ChunkBuffer { out, row_bytes, element, dtype, lead };
                    self.decode_copy(matrix, p, &mut out, buffers)?;
                }
            }
            Ok(())
        })
    }

    /// A scale tensor as rows of bytes.
    pub(super) fn scale_panel(&self, scales: &MatrixScales, tensor: SourceId) -> Panel {
        let row_bytes = scales.cols * u64::try_from(scales.scale.bytes()).expect("a few bytes");
        Panel::whole_rows(tensor, self.checkpoint.tensor(tensor).bytes / row_bytes, row_bytes)
    }

    /// Decodes one copy of a fragment, of whatever strides, into the chunk.
    fn decode_copy(
        &self,
        matrix: &Matrix,
        p: &BoxCopy,
        chunk: &mut ChunkBuffer<'_>,
        buffers: &mut DecodeBuffers,
    ) -> Result<(), DecodeError> {
        let dense_target = p.to_cols.step == 1 || p.to_cols.count == 1;
        let nibbles = payload_code(matrix).is_some_and(|c| c.bits() == 4);
        let aligned = !nibbles || p.cols.start.is_multiple_of(2);
        let dense_cols = p.cols.step == 1 || p.cols.count == 1;
        if dense_target && aligned && dense_cols {
            if p.rows.step == 1 || p.rows.count == 1 {
                return self.decode_dense(matrix, p, chunk, buffers);
            }
            if !p.transposed {
                // The rows are strided, the columns are dense: decode one row at a time.
                for i in 0..p.rows.count {
                    let one = |s: StridedRange| StridedRange {
                        start: s.start + i * s.step,
                        step: 1,
                        count: 1,
                    };
                    let row = BoxCopy { rows: one(p.rows), to_rows: one(p.to_rows), ..*p };
                    self.decode_dense(matrix, &row, chunk, buffers)?;
                }
                return Ok(());
            }
        }
        self.decode_scattered(matrix, p, chunk, buffers)
    }

    /// Decodes a copy that is dense in the matrix and in the columns of the chunk, in place.
    fn decode_dense(
        &self,
        matrix: &Matrix,
        p: &BoxCopy,
        chunk: &mut ChunkBuffer<'_>,
        buffers: &mut DecodeBuffers,
    ) -> Result<(), DecodeError> {
        let at =
            to_usize(p.to_rows.start) * chunk.row_bytes + to_usize(p.to_cols.start) * chunk.element;
        let stride = chunk.row_bytes * to_usize(p.to_rows.step);
        let orientation =
            if p.transposed { Orientation::Transposed } else { Orientation::Straight };
        let (element, dtype, lead) = (chunk.element, chunk.dtype, chunk.lead);
        let out = Destination { at, stride, orientation, element, dtype, lead };
        self.decode_box(matrix, p.rows, p.cols, &out, chunk.out, buffers)
    }

    /// Decodes a strided copy: the dense box around it into a buffer, then copies its elements.
    fn decode_scattered(
        &self,
        matrix: &Matrix,
        p: &BoxCopy,
        chunk: &mut ChunkBuffer<'_>,
        buffers: &mut DecodeBuffers,
    ) -> Result<(), DecodeError> {
        let around = |s: StridedRange, start: u64| StridedRange {
            start,
            step: 1,
            count: s.start + s.step * (s.count - 1) - start + 1,
        };
        // 4-bit codes: a box of bytes starts at an even column.
        let rows = around(p.rows, p.rows.start);
        let cols = around(p.cols, p.cols.start - p.cols.start % 2);
        let element = chunk.element;
        let stride = to_usize(cols.count) * element;
        let mut decoded = std::mem::take(&mut buffers.decoded);
        decoded.resize(to_usize(rows.count) * stride, 0);
        let orientation = Orientation::Straight;
        let (dtype, lead) = (chunk.dtype, chunk.lead);
        let out = Destination { at: 0, stride, orientation, element, dtype, lead };
        let done = self.decode_box(matrix, rows, cols, &out, &mut decoded, buffers);
        if done.is_ok() {
            let first_col = p.cols.start - cols.start;
            for r in 0..p.rows.count {
                for c in 0..p.cols.count {
                    let (i, j) = if p.transposed { (c, r) } else { (r, c) };
                    let to = to_usize(p.to_rows.start + i * p.to_rows.step) * chunk.row_bytes
                        + to_usize(p.to_cols.start + j * p.to_cols.step) * element;
                    let from = to_usize(r * p.rows.step) * stride
                        + to_usize(first_col + c * p.cols.step) * element;
                    chunk.out[to..to + element].copy_from_slice(&decoded[from..from + element]);
                }
            }
        }
        buffers.decoded = decoded;
        done
    }

    /// Reads and decodes a dense box of a matrix to `out` in `bytes`.
    fn decode_box(
        &self,
        matrix: &Matrix,
        rows: StridedRange,
        cols: StridedRange,
        out: &Destination,
        bytes: &mut [u8],
        buffers: &mut DecodeBuffers,
    ) -> Result<(), DecodeError> {
        let (whole_rows, bits) = (payload_panel(matrix), payload_bits(matrix));
        let (first, width) = (cols.start * bits / 8, (cols.count * bits).div_ceil(8));
        let matrix_box = MatrixBox { matrix, rows, cols };
        let lead = out.lead * bits / 8;
        let use_cache = self.use_cached_rows(out.orientation, whole_rows, width, rows.count);
        if use_cache && first < lead && lead < first + width {
            // The strip overlaps both panels: decode the leading columns and the rest separately.
            let before = out.lead - cols.start;
            let halves = [(cols.start, before), (out.lead, cols.count - before)];
            for (start, count) in halves {
                let cols = StridedRange { start, count, ..cols };
                let at = out.at + to_usize(start - matrix_box.cols.start) * out.stride;
                let out = Destination { at, ..*out };
                self.decode_box(matrix, rows, cols, &out, bytes, buffers)?;
            }
            return Ok(());
        }
        if use_cache && let Some(panel) = self.choose_panel(whole_rows, rows.start, first, lead) {
            let mut left: Vec<_> = panel.segments(rows.start, rows.count).collect();
            // First the segments that no other thread is reading, so that two readers of the same
            // rows share the work.
            for wait in [false, true] {
                let mut in_flight = Vec::new();
                for segment in left {
                    let rows = segment.intersection(rows);
                    let source = (self.checkpoint, self.counters);
                    match self.source_rows.get(source, segment, wait)? {
                        Some(bytes_read) => {
                            let skip = to_usize(first - panel.start);
                            let codes = &bytes_read.rows_from(rows.start)[skip..];
                            let codes = Codes { bytes: codes, stride: to_usize(panel.width) };
                            self.decode_rows(&matrix_box, rows, codes, out, bytes, buffers)?;
                        }
                        None => in_flight.push(segment),
                    }
                }
                left = in_flight;
            }
            return Ok(());
        }
        let (width, height) = (to_usize(width), to_usize(rows.count));
        let mut payload = std::mem::take(&mut buffers.payload);
        payload.resize((width * height).max(payload.len()), 0);
        let at = rows.start * whole_rows.row_bytes + first;
        let read =
            self.read_rows(matrix.payload, at, width, whole_rows.row_bytes, height, &mut payload);
        let codes = Codes { bytes: &payload, stride: width };
        let done =
            read.and_then(|()| self.decode_rows(&matrix_box, rows, codes, out, bytes, buffers));
        buffers.payload = payload;
        done
    }

    /// Whether to take a strip of `width` bytes of `count` source rows from cached rows: only for
    /// transposed matrices, narrow strips, and if the rows fit in the cache.
    pub(super) fn use_cached_rows(
        &self,
        orientation: Orientation,
        whole_rows: Panel,
        width: u64,
        count: u64,
    ) -> bool {
        orientation == Orientation::Transposed
            && whole_rows.is_narrow_strip(width, count)
            && self.source_rows.can_hold(count * whole_rows.row_bytes)
    }

    /// The panel from which to take the strip at byte `at` of the source rows: one that is cached,
    /// or the one that [`SourceWidth`] says to cache. `None` if the strip is to be read alone.
    fn choose_panel(&self, whole_rows: Panel, row: u64, at: u64, lead: u64) -> Option<Panel> {
        let panel = whole_rows.containing(lead, at);
        let cached = |panel: &Panel| self.source_rows.contains(*panel, row);
        [whole_rows, panel].into_iter().find(cached).or(match self.source_width {
            SourceWidth::Strip => None,
            SourceWidth::Panel => Some(panel),
            SourceWidth::WholeRows => Some(whole_rows),
        })
    }

    /// Decodes rows `rows` of a box from their codes. Matrices without scales are cast or copied.
    fn decode_rows(
        &self,
        matrix_box: &MatrixBox<'_>,
        rows: StridedRange,
        codes: Codes<'_>,
        out: &Destination,
        bytes: &mut [u8],
        buffers: &mut DecodeBuffers,
    ) -> Result<(), DecodeError> {
        let MatrixBox { matrix, cols, .. } = *matrix_box;
        let Codes { bytes: payload, stride } = codes;
        let n_cols = to_usize(cols.count);
        let offset_of = |row: u64| {
            let first = to_usize(row - matrix_box.rows.start);
            out.at
                + match out.orientation {
                    Orientation::Straight => first * out.stride,
                    Orientation::Transposed => first * out.element,
                }
        };
        let Some(quantized) = &matrix.scales else {
            let to = &mut bytes[offset_of(rows.start)..];
            let height = to_usize(rows.count);
            match (matrix.dtype.as_float(), out.float()) {
                (Some(from), Some(float)) if from.dtype() != float.dtype() => {
                    let code = float_code(from);
                    let tile = Tile {
                        code,
                        bytes: payload,
                        stride,
                        rows: height,
                        cols: n_cols,
                        scales: None,
                    };
                    decode(&tile, float, out.orientation, to, out.stride);
                }
                _ => {
                    let (element, orientation) = (out.element, out.orientation);
                    copy2d(element, payload, stride, height, n_cols, orientation, to, out.stride);
                }
            }
            return Ok(());
        };
        for band in &quantized.bands[first_band(quantized, rows.start)..] {
            let start = rows.start.max(band.rows.start);
            let end = (rows.start + rows.count).min(band.rows.end);
            if start >= end {
                break;
            }
            let block = quantized.block;
            // The row counted from the first row of the band's first block.
            let block_row = start - band.rows.start + band.skip;
            let scale_rows = (block_row / block[0], (block_row + (end - start) - 1) / block[0]);
            let scale_cols = (cols.start / block[1], (cols.start + cols.count - 1) / block[1]);
            let of = |(first, last): (u64, u64), at| StridedRange {
                start: first + at,
                step: 1,
                count: last - first + 1,
            };
            let (scale_rows, scale_cols) = (of(scale_rows, band.row), of(scale_cols, 0));
            self.scales(quantized, band, scale_rows, scale_cols, out.orientation, buffers)?;
            let tile = Tile {
                code: quantized.code(),
                bytes: &payload[to_usize(start - rows.start) * stride..],
                stride,
                rows: to_usize(end - start),
                cols: n_cols,
                scales: Some(Scales {
                    values: &buffers.scales,
                    stride: to_usize(scale_cols.count),
                    block: [to_usize(block[0]), to_usize(block[1])],
                    phase: [to_usize(block_row % block[0]), to_usize(cols.start % block[1])],
                }),
            };
            let float = out.float().expect("the planner gives quantized tensors a float dtype");
            decode(&tile, float, out.orientation, &mut bytes[offset_of(start)..], out.stride);
        }
        Ok(())
    }

    /// Reads a box of a scale tensor into `buffers.scales`, dense, as F32.
    fn scales(
        &self,
        quantized: &MatrixScales,
        band: &ScaleBand<SourceId>,
        rows: StridedRange,
        cols: StridedRange,
        orientation: Orientation,
        buffers: &mut DecodeBuffers,
    ) -> Result<(), DecodeError> {
        let element = u64::try_from(quantized.scale.bytes()).expect("a few bytes");
        let whole_rows = self.scale_panel(quantized, band.scale);
        let row_bytes = whole_rows.row_bytes;
        let (first, width) = (to_usize(cols.start * element), to_usize(cols.count * element));
        let dense = &mut buffers.scale_bytes;
        dense.resize(width * to_usize(rows.count), 0);
        let use_cache =
            self.use_cached_rows(orientation, whole_rows, cols.count * element, rows.count);
        match self.choose_panel(whole_rows, rows.start, 0, 0).filter(|_| use_cache) {
            Some(panel) => {
                for segment in panel.segments(rows.start, rows.count) {
                    let part = segment.intersection(rows);
                    let source = (self.checkpoint, self.counters);
                    let bytes_read = self.source_rows.get(source, segment, true)?;
                    let bytes_read = bytes_read.expect("`get` waits");
                    let from = bytes_read.rows_from(part.start).chunks(to_usize(row_bytes));
                    let dense = &mut dense[to_usize(part.start - rows.start) * width..];
                    let dense = dense.chunks_exact_mut(width).take(to_usize(part.count));
                    // A copy of constant length compiles to a single move.
                    match width {
                        4 => dense.zip(from).for_each(|(to, row)| copy::<4>(to, &row[first..])),
                        8 => dense.zip(from).for_each(|(to, row)| copy::<8>(to, &row[first..])),
                        _ => dense
                            .zip(from)
                            .for_each(|(to, row)| to.copy_from_slice(&row[first..][..width])),
                    }
                }
            }
            None => {
                let at = rows.start * row_bytes + cols.start * element;
                self.read_rows(band.scale, at, width, row_bytes, to_usize(rows.count), dense)?;
            }
        }
        buffers.scales.resize(to_usize(rows.count * cols.count), 0.0);
        scale_to_f32(quantized.scale, dense, &mut buffers.scales);
        Ok(())
    }

    /// Reads a strip of `rows` rows from the source: `width` bytes each, `stride` bytes apart.
    fn read_rows(
        &self,
        id: SourceId,
        at: u64,
        width: usize,
        stride: u64,
        rows: usize,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let bytes = to_u64(width * rows);
        add(&self.counters.source_bytes, bytes);
        self.checkpoint
            .read_rows(id, at, width, stride, rows, out, width)
            .map_err(DecodeError::from)
    }
}

/// A dense box of a matrix.
struct MatrixBox<'a> {
    matrix: &'a Matrix,
    rows: StridedRange,
    cols: StridedRange,
}

/// The source bytes of some rows, from the first column of a box on.
#[derive(Clone, Copy)]
struct Codes<'a> {
    bytes: &'a [u8],
    /// Bytes from one row to the next.
    stride: usize,
}

/// The buffer of a chunk and its geometry.
struct ChunkBuffer<'a> {
    out: &'a mut [u8],
    row_bytes: usize,
    /// Bytes of an element.
    element: usize,
    dtype: DType,
    /// See [`leading_columns`].
    lead: u64,
}

/// Where in a buffer a dense box is decoded to.
struct Destination {
    /// Offset of its first element, in bytes.
    at: usize,
    /// Bytes from one row to the next.
    stride: usize,
    orientation: Orientation,
    /// Bytes of an element.
    element: usize,
    dtype: DType,
    /// See [`leading_columns`].
    lead: u64,
}

impl Destination {
    fn float(&self) -> Option<Float> {
        self.dtype.as_float()
    }
}

/// Columns of a transposed matrix that produce the first [`LEADING_PANEL_BYTES`] of a plane.
pub(super) fn leading_columns(grid: &Grid) -> u64 {
    (LEADING_PANEL_BYTES / grid.row_bytes.max(1)).next_multiple_of(LEADING_COLUMN_MULTIPLE)
}

/// Bits of an element of a matrix's payload.
pub(super) fn payload_bits(matrix: &Matrix) -> u64 {
    match payload_code(matrix) {
        Some(code) => u64::from(code.bits()),
        None => u64::from(matrix.dtype.bits()),
    }
}

/// A matrix's payload as rows of bytes.
pub(super) fn payload_panel(matrix: &Matrix) -> Panel {
    Panel::whole_rows(matrix.payload, matrix.rows(), matrix.cols() * payload_bits(matrix) / 8)
}

fn payload_code(matrix: &Matrix) -> Option<Code> {
    matrix.scales.as_ref().map(MatrixScales::code)
}

fn float_code(float: Float) -> Code {
    match float {
        Float::BF16 => Code::BF16,
        Float::F16 => Code::F16,
        Float::F32 => Code::F32,
    }
}

/// Position of the first scale band that contains rows from `row` on.
fn first_band(scales: &MatrixScales, row: u64) -> usize {
    scales.bands.partition_point(|b| b.rows.end <= row)
}

fn copy<const N: usize>(to: &mut [u8], from: &[u8]) {
    if let (Some(to), Some(from)) = (to.first_chunk_mut::<N>(), from.first_chunk::<N>()) {
        *to = *from;
    }
}
