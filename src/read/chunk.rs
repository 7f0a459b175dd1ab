//! Decodes one chunk of a computed tensor: every fragment that reaches into it, into place.

use crate::tensor::{to_u64, to_usize};
use std::cell::RefCell;
use std::sync::Arc;

use super::counters::{Counters, add};
use super::placement::{Placement, Span, placements};
use super::slabs::{Keep, Slabs, Stored};
use crate::codec::{Code, Orientation, Scales, Tile, copy2d, decode, scale_to_f32};
use crate::plan::{ChunkBox, Computed, Grid, Matrix, MatrixId, MatrixScales, ScaleBand};
use crate::source::{Checkpoint, SourceId, SourceReadError};
use crate::tensor::{DType, Float, Shape};

/// Buffers that a thread keeps from chunk to chunk.
#[derive(Default)]
struct Scratch {
    payload: Vec<u8>,
    scale_bytes: Vec<u8>,
    scales: Vec<f32>,
    decoded: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Why a chunk could not be made; shared by all who wait for it.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    /// The source gave an error.
    Source(Arc<SourceReadError>),
    /// Whoever read the rows that this chunk waited for died of it.
    Abandoned,
}

impl From<SourceReadError> for Failure {
    fn from(error: SourceReadError) -> Failure {
        Failure::Source(Arc::new(error))
    }
}

/// Bytes of a plane whose stored columns are the leading ones: what the kernel reads ahead beyond
/// the last expert that a reader wants, two windows of 4 MiB, does not cost the others.
pub(super) const LEADING: u64 = 8 << 20;

/// Leading columns are a multiple of this: the block of every scheme, and whole bytes.
const COLUMN_MULTIPLE: u64 = 128;

/// What a chunk is decoded from and counted in.
#[derive(Clone, Copy)]
pub(super) struct ChunkReader<'a> {
    pub checkpoint: &'a Checkpoint,
    pub counters: &'a Counters,
    /// Where transposed matrices are read from.
    pub slabs: &'a Slabs,
    /// What is read of them beyond the strip that a chunk wants.
    pub keep: Keep,
    /// The bytes of each row that are wanted, where not all of them are: first and end.
    pub bytes: Option<(u64, u64)>,
}

impl ChunkReader<'_> {
    /// Fills `out` with the chunk at `chunk` of a tensor.
    ///
    /// # Errors
    /// What the source fails with.
    pub(super) fn fill<'m>(
        &self,
        computed: &Computed,
        matrix_of: impl Fn(MatrixId) -> &'m Matrix,
        shape: &Shape,
        dtype: DType,
        chunk: ChunkBox,
        out: &mut [u8],
    ) -> Result<(), Failure> {
        let element = to_usize(u64::from(dtype.bits() / 8));
        let row_bytes = to_usize(computed.grid.row_bytes);
        let lead = lead(&computed.grid);
        let wanted = |p: &Placement| {
            let end = p.to_cols.start + p.to_cols.step * (p.to_cols.count - 1) + 1;
            let bytes = (p.to_cols.start * to_u64(element), end * to_u64(element));
            self.bytes.is_none_or(|(start, end)| bytes.0 < end && start < bytes.1)
        };
        SCRATCH.with_borrow_mut(|scratch| {
            for fragment in computed.fragments_of(chunk.plane) {
                let matrix = matrix_of(fragment.matrix);
                for p in placements(fragment, matrix, shape, chunk).iter().filter(|p| wanted(p)) {
                    let mut place = Place { out, row_bytes, element, dtype, lead };
                    self.place(matrix, p, &mut place, scratch)?;
                }
            }
            Ok(())
        })
    }

    /// A scale tensor as rows.
    pub(super) fn stored_scales(&self, scales: &MatrixScales, tensor: SourceId) -> Stored {
        let row_bytes = scales.cols * u64::try_from(scales.scale.bytes()).expect("a few bytes");
        Stored::whole(tensor, self.checkpoint.tensor(tensor).bytes / row_bytes, row_bytes)
    }

    fn place(
        &self,
        matrix: &Matrix,
        p: &Placement,
        place: &mut Place<'_>,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let dense_target = p.to_cols.step == 1 || p.to_cols.count == 1;
        let nibbles = code_of(matrix).is_some_and(|c| c.bits() == 4);
        let aligned = !nibbles || p.cols.start.is_multiple_of(2);
        let dense_cols = p.cols.step == 1 || p.cols.count == 1;
        if dense_target && aligned && dense_cols {
            if p.rows.step == 1 || p.rows.count == 1 {
                return self.block(matrix, p, place, scratch);
            }
            if !p.transposed {
                // Rows apart in the matrix, columns together: one row at a time.
                for i in 0..p.rows.count {
                    let one = |s: Span| Span { start: s.start + i * s.step, step: 1, count: 1 };
                    let row = Placement { rows: one(p.rows), to_rows: one(p.to_rows), ..*p };
                    self.block(matrix, &row, place, scratch)?;
                }
                return Ok(());
            }
        }
        self.scattered(matrix, p, place, scratch)
    }

    /// A box that is dense in the matrix and whose chunk columns are dense: decoded in place.
    fn block(
        &self,
        matrix: &Matrix,
        p: &Placement,
        place: &mut Place<'_>,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let at =
            to_usize(p.to_rows.start) * place.row_bytes + to_usize(p.to_cols.start) * place.element;
        let stride = place.row_bytes * to_usize(p.to_rows.step);
        let orientation =
            if p.transposed { Orientation::Transposed } else { Orientation::Straight };
        let (element, dtype, lead) = (place.element, place.dtype, place.lead);
        let out = Out { at, stride, orientation, element, dtype, lead };
        self.decode_box(matrix, p.rows, p.cols, &out, place.out, scratch)
    }

    /// Any box: the dense box around it is decoded aside, its elements are picked from there.
    fn scattered(
        &self,
        matrix: &Matrix,
        p: &Placement,
        place: &mut Place<'_>,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let around = |s: Span, start: u64| Span {
            start,
            step: 1,
            count: s.start + s.step * (s.count - 1) - start + 1,
        };
        // Nibbles start at an even column.
        let rows = around(p.rows, p.rows.start);
        let cols = around(p.cols, p.cols.start - p.cols.start % 2);
        let element = place.element;
        let stride = to_usize(cols.count) * element;
        let mut decoded = std::mem::take(&mut scratch.decoded);
        decoded.resize(to_usize(rows.count) * stride, 0);
        let orientation = Orientation::Straight;
        let (dtype, lead) = (place.dtype, place.lead);
        let out = Out { at: 0, stride, orientation, element, dtype, lead };
        let done = self.decode_box(matrix, rows, cols, &out, &mut decoded, scratch);
        if done.is_ok() {
            let first_col = p.cols.start - cols.start;
            for r in 0..p.rows.count {
                for c in 0..p.cols.count {
                    let (i, j) = if p.transposed { (c, r) } else { (r, c) };
                    let to = to_usize(p.to_rows.start + i * p.to_rows.step) * place.row_bytes
                        + to_usize(p.to_cols.start + j * p.to_cols.step) * element;
                    let from = to_usize(r * p.rows.step) * stride
                        + to_usize(first_col + c * p.cols.step) * element;
                    place.out[to..to + element].copy_from_slice(&decoded[from..from + element]);
                }
            }
        }
        scratch.decoded = decoded;
        done
    }

    /// Reads and decodes a dense box of a matrix.
    fn decode_box(
        &self,
        matrix: &Matrix,
        rows: Span,
        cols: Span,
        out: &Out,
        bytes: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let (stored, bits) = (stored_payload(matrix), bits_of(matrix));
        let (first, width) = (cols.start * bits / 8, (cols.count * bits).div_ceil(8));
        let part = Part { matrix, rows, cols };
        let lead = out.lead * bits / 8;
        let worth = self.worth(out.orientation, stored, width, rows.count);
        if worth && first < lead && lead < first + width {
            // Out of two panels: the leading columns and the rest.
            let before = out.lead - cols.start;
            let halves = [(cols.start, before), (out.lead, cols.count - before)];
            for (start, count) in halves {
                let cols = Span { start, count, ..cols };
                let at = out.at + to_usize(start - part.cols.start) * out.stride;
                let out = Out { at, ..*out };
                self.decode_box(matrix, rows, cols, &out, bytes, scratch)?;
            }
            return Ok(());
        }
        if worth && let Some(stored) = self.panel(stored, rows.start, first, lead) {
            let mut left: Vec<_> = stored.bands(rows.start, rows.count).collect();
            // First the bands that nobody else is reading just now, so that two readers share the
            // reading of the same rows.
            for wait in [false, true] {
                let mut busy = Vec::new();
                for band in left {
                    let rows = band.within(rows);
                    let source = (self.checkpoint, self.counters);
                    match self.slabs.get(source, band, wait)? {
                        Some(slab) => {
                            let codes = &slab.rows_from(rows.start)[to_usize(first - stored.at)..];
                            let codes = Codes { bytes: codes, stride: to_usize(stored.width) };
                            self.decode_rows(&part, rows, codes, out, bytes, scratch)?;
                        }
                        None => busy.push(band),
                    }
                }
                left = busy;
            }
            return Ok(());
        }
        let (width, height) = (to_usize(width), to_usize(rows.count));
        let mut payload = std::mem::take(&mut scratch.payload);
        payload.resize((width * height).max(payload.len()), 0);
        let at = rows.start * stored.row_bytes + first;
        let read =
            self.read_rows(matrix.payload, at, width, stored.row_bytes, height, &mut payload);
        let codes = Codes { bytes: &payload, stride: width };
        let done = read.and_then(|()| self.decode_rows(&part, rows, codes, out, bytes, scratch));
        scratch.payload = payload;
        done
    }

    /// Whether strips of `width` bytes of `count` stored rows are better taken out of slabs.
    pub(super) fn worth(
        &self,
        orientation: Orientation,
        stored: Stored,
        width: u64,
        count: u64,
    ) -> bool {
        orientation == Orientation::Transposed
            && stored.narrow(width, count)
            && self.slabs.can_hold(count * stored.row_bytes)
    }

    /// The panel of stored rows to take a strip at byte `at` of them out of: one that is there, or
    /// that is to be kept; `None` where the strip is read alone.
    fn panel(&self, whole: Stored, row: u64, at: u64, lead: u64) -> Option<Stored> {
        let part = whole.part(lead, at);
        let there = |stored: &Stored| self.slabs.has(*stored, row);
        [whole, part].into_iter().find(there).or(match self.keep {
            Keep::Nothing => None,
            Keep::Part => Some(part),
            Keep::Rows => Some(whole),
        })
    }

    /// Decodes some rows of a part of a matrix; `codes` are theirs.
    fn decode_rows(
        &self,
        part: &Part<'_>,
        rows: Span,
        codes: Codes<'_>,
        out: &Out,
        bytes: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let Part { matrix, cols, .. } = *part;
        let Codes { bytes: payload, stride } = codes;
        let wide = to_usize(cols.count);
        let to_of = |row: u64| {
            let first = to_usize(row - part.rows.start);
            out.at
                + match out.orientation {
                    Orientation::Straight => first * out.stride,
                    Orientation::Transposed => first * out.element,
                }
        };
        let Some(quantized) = &matrix.scales else {
            let to = &mut bytes[to_of(rows.start)..];
            let height = to_usize(rows.count);
            match (matrix.dtype.as_float(), out.float()) {
                (Some(from), Some(float)) if from.dtype() != float.dtype() => {
                    let code = code_of_float(from);
                    let tile = Tile {
                        code,
                        bytes: payload,
                        stride,
                        rows: height,
                        cols: wide,
                        scales: None,
                    };
                    decode(&tile, float, out.orientation, to, out.stride);
                }
                _ => {
                    let (element, orientation) = (out.element, out.orientation);
                    copy2d(element, payload, stride, height, wide, orientation, to, out.stride);
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
            let into = start - band.rows.start + band.skip;
            let scale_rows = (into / block[0], (into + (end - start) - 1) / block[0]);
            let scale_cols = (cols.start / block[1], (cols.start + cols.count - 1) / block[1]);
            let of = |(first, last): (u64, u64), at| Span {
                start: first + at,
                step: 1,
                count: last - first + 1,
            };
            let (scale_rows, scale_cols) = (of(scale_rows, band.row), of(scale_cols, 0));
            self.scales(quantized, band, scale_rows, scale_cols, out.orientation, scratch)?;
            let tile = Tile {
                code: quantized.code(),
                bytes: &payload[to_usize(start - rows.start) * stride..],
                stride,
                rows: to_usize(end - start),
                cols: wide,
                scales: Some(Scales {
                    values: &scratch.scales,
                    stride: to_usize(scale_cols.count),
                    block: [to_usize(block[0]), to_usize(block[1])],
                    phase: [to_usize(into % block[0]), to_usize(cols.start % block[1])],
                }),
            };
            let float = out.float().expect("the planner gives quantized tensors a float dtype");
            decode(&tile, float, out.orientation, &mut bytes[to_of(start)..], out.stride);
        }
        Ok(())
    }

    /// Reads a box of a scale tensor as numbers, dense, into `scratch.scales`.
    fn scales(
        &self,
        quantized: &MatrixScales,
        band: &ScaleBand<SourceId>,
        rows: Span,
        cols: Span,
        orientation: Orientation,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let element = u64::try_from(quantized.scale.bytes()).expect("a few bytes");
        let stored = self.stored_scales(quantized, band.scale);
        let row_bytes = stored.row_bytes;
        let (first, width) = (to_usize(cols.start * element), to_usize(cols.count * element));
        let dense = &mut scratch.scale_bytes;
        dense.resize(width * to_usize(rows.count), 0);
        let worth = self.worth(orientation, stored, cols.count * element, rows.count);
        match self.panel(stored, rows.start, 0, 0).filter(|_| worth) {
            Some(stored) => {
                for band in stored.bands(rows.start, rows.count) {
                    let part = band.within(rows);
                    let source = (self.checkpoint, self.counters);
                    let slab = self.slabs.get(source, band, true)?;
                    let slab = slab.expect("it was waited for");
                    let from = slab.rows_from(part.start).chunks(to_usize(row_bytes));
                    let dense = &mut dense[to_usize(part.start - rows.start) * width..];
                    let dense = dense.chunks_exact_mut(width).take(to_usize(part.count));
                    // Copies of a known length are single moves.
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
        scratch.scales.resize(to_usize(rows.count * cols.count), 0.0);
        scale_to_f32(quantized.scale, dense, &mut scratch.scales);
        Ok(())
    }

    fn read_rows(
        &self,
        id: SourceId,
        at: u64,
        width: usize,
        stride: u64,
        rows: usize,
        out: &mut [u8],
    ) -> Result<(), Failure> {
        let bytes = to_u64(width * rows);
        add(&self.counters.source_bytes, bytes);
        self.checkpoint.read_rows(id, at, width, stride, rows, out, width).map_err(Failure::from)
    }
}

/// A dense box of a matrix.
struct Part<'a> {
    matrix: &'a Matrix,
    rows: Span,
    cols: Span,
}

/// Stored rows, from the first column of a box on.
#[derive(Clone, Copy)]
struct Codes<'a> {
    bytes: &'a [u8],
    stride: usize,
}

/// A chunk's buffer.
struct Place<'a> {
    out: &'a mut [u8],
    row_bytes: usize,
    element: usize,
    dtype: DType,
    lead: u64,
}

/// Where a dense box goes.
struct Out {
    at: usize,
    stride: usize,
    orientation: Orientation,
    element: usize,
    dtype: DType,
    /// Leading columns of the matrix.
    lead: u64,
}

impl Out {
    fn float(&self) -> Option<Float> {
        self.dtype.as_float()
    }
}

/// Columns of transposed matrices that are the leading ones.
pub(super) fn lead(grid: &Grid) -> u64 {
    (LEADING / grid.row_bytes.max(1)).next_multiple_of(COLUMN_MULTIPLE)
}

/// Bits of an element of the payload.
pub(super) fn bits_of(matrix: &Matrix) -> u64 {
    match code_of(matrix) {
        Some(code) => u64::from(code.bits()),
        None => u64::from(matrix.dtype.bits()),
    }
}

/// The payload as rows.
pub(super) fn stored_payload(matrix: &Matrix) -> Stored {
    Stored::whole(matrix.payload, matrix.rows(), matrix.cols() * bits_of(matrix) / 8)
}

fn code_of(matrix: &Matrix) -> Option<Code> {
    matrix.scales.as_ref().map(MatrixScales::code)
}

fn code_of_float(float: Float) -> Code {
    match float {
        Float::BF16 => Code::BF16,
        Float::F16 => Code::F16,
        Float::F32 => Code::F32,
    }
}

/// The band that holds a row.
fn first_band(scales: &MatrixScales, row: u64) -> usize {
    scales.bands.partition_point(|b| b.rows.end <= row)
}

fn copy<const N: usize>(to: &mut [u8], from: &[u8]) {
    if let (Some(to), Some(from)) = (to.first_chunk_mut::<N>(), from.first_chunk::<N>()) {
        *to = *from;
    }
}
