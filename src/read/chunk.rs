//! Decodes one chunk of a computed tensor: every fragment that reaches into it, into place.

use std::cell::RefCell;
use std::sync::Arc;

use super::counters::{Counters, add};
use super::placement::{Placement, Span, placements};
use super::slabs::{Slabs, Stored};
use crate::codec::{Code, Orientation, Scales, Tile, copy2d, decode, scale_to_f32};
use crate::plan::{Band, ChunkBox, Computed, Grid, Matrix, MatrixId, MatrixScales};
use crate::source::{Checkpoint, ReadError, SourceId};
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

/// A file position or count as a length in memory: boxes of a chunk fit in memory.
pub fn len(n: u64) -> usize {
    usize::try_from(n).expect("a box of a chunk fits in memory")
}

/// Why a chunk could not be made; shared by all who wait for it.
#[derive(Clone, Debug)]
pub enum Failure {
    /// The source gave an error.
    Source(Arc<ReadError>),
    /// Whoever read the rows that this chunk waited for died of it.
    Abandoned,
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Failure {
        Failure::Source(Arc::new(error))
    }
}

/// What a chunk is decoded from and counted in.
#[derive(Clone, Copy)]
pub struct ChunkReader<'a> {
    pub checkpoint: &'a Checkpoint,
    pub counters: &'a Counters,
    /// Where transposed matrices are read from; `None` while it may be that only a few strips of
    /// them are wanted, which are read alone.
    pub slabs: Option<&'a Slabs>,
    /// Leading rows of the chunk that another request decodes too.
    pub shared_rows: u64,
}

impl ChunkReader<'_> {
    /// Fills `out` with the chunk at `chunk` of a tensor.
    ///
    /// # Errors
    /// What the source fails with.
    pub fn fill<'m>(
        &self,
        computed: &Computed,
        matrix_of: impl Fn(MatrixId) -> &'m Matrix,
        shape: &Shape,
        dtype: DType,
        chunk: ChunkBox,
        out: &mut [u8],
    ) -> Result<(), Failure> {
        let element = len(u64::from(dtype.bits() / 8));
        let row_bytes = len(computed.grid.row_bytes);
        SCRATCH.with_borrow_mut(|scratch| {
            for fragment in computed.fragments_of(chunk.plane) {
                let matrix = matrix_of(fragment.matrix);
                for p in placements(fragment, matrix, shape, chunk) {
                    let mut place = Place { out, row_bytes, element, dtype };
                    self.place(matrix, &p, &mut place, scratch)?;
                }
            }
            Ok(())
        })
    }

    /// Reads the stored rows that chunks of a plane are transposes of, for whoever asks for them.
    ///
    /// # Errors
    /// What the source fails with.
    pub fn load<'m>(
        &self,
        computed: &Computed,
        matrix_of: impl Fn(MatrixId) -> &'m Matrix,
        shape: &Shape,
        plane: u64,
    ) -> Result<(), Failure> {
        let Grid { rows, chunk_rows, .. } = computed.grid;
        let whole = ChunkBox { plane, row: 0, rows };
        for fragment in computed.fragments_of(plane) {
            let matrix = matrix_of(fragment.matrix);
            for p in placements(fragment, matrix, shape, whole).iter().filter(|p| p.transposed) {
                let stored = stored_payload(matrix);
                let width = chunk_rows.min(p.cols.count) * stored.row_bytes / matrix.cols();
                let count = p.rows.step * (p.rows.count - 1) + 1;
                if let Some(slabs) = self.slabs_for(Orientation::Transposed, stored, width, count) {
                    let source = (self.checkpoint, self.counters);
                    slabs.load(source, stored, p.rows.start, count)?;
                }
            }
        }
        Ok(())
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
        let at = len(p.to_rows.start) * place.row_bytes + len(p.to_cols.start) * place.element;
        let stride = place.row_bytes * len(p.to_rows.step);
        let orientation =
            if p.transposed { Orientation::Transposed } else { Orientation::Straight };
        let shared = self.shared_rows.saturating_sub(p.to_rows.start).min(p.cols.count);
        let (element, dtype) = (place.element, place.dtype);
        let out = Out { at, stride, orientation, element, dtype, shared };
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
        let stride = len(cols.count) * element;
        let mut decoded = std::mem::take(&mut scratch.decoded);
        decoded.resize(len(rows.count) * stride, 0);
        let orientation = Orientation::Straight;
        let out = Out { at: 0, stride, orientation, element, dtype: place.dtype, shared: 0 };
        let done = self.decode_box(matrix, rows, cols, &out, &mut decoded, scratch);
        if done.is_ok() {
            let first_col = p.cols.start - cols.start;
            for r in 0..p.rows.count {
                for c in 0..p.cols.count {
                    let (i, j) = if p.transposed { (c, r) } else { (r, c) };
                    let to = len(p.to_rows.start + i * p.to_rows.step) * place.row_bytes
                        + len(p.to_cols.start + j * p.to_cols.step) * element;
                    let from =
                        len(r * p.rows.step) * stride + len(first_col + c * p.cols.step) * element;
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
        if let Some(slabs) = self.slabs_for(out.orientation, stored, width, rows.count) {
            let used = (cols.count - out.shared) * bits;
            let mut left: Vec<_> = stored.bands(rows.start, rows.count).collect();
            // First the bands that nobody else is reading just now, so that two readers share the
            // reading of the same rows.
            for wait in [false, true] {
                let mut busy = Vec::new();
                for band in left {
                    let rows = band.within(rows);
                    let source = (self.checkpoint, self.counters);
                    match slabs.get(source, band, used * rows.count, wait)? {
                        Some(slab) => {
                            let codes = &slab.from_row(rows.start)[len(first)..];
                            let codes = Codes { bytes: codes, stride: len(stored.row_bytes) };
                            self.decode_rows(&part, rows, codes, out, bytes, scratch)?;
                        }
                        None => busy.push(band),
                    }
                }
                left = busy;
            }
            return Ok(());
        }
        let (width, height) = (len(width), len(rows.count));
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

    /// The slabs, where `count` rows of a stored tensor are to be read from there.
    fn slabs_for(
        &self,
        orientation: Orientation,
        stored: Stored,
        width: u64,
        count: u64,
    ) -> Option<&Slabs> {
        let transposed = orientation == Orientation::Transposed;
        self.slabs.filter(|slabs| {
            transposed && stored.narrow(width, count) && slabs.can_hold(count * stored.row_bytes)
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
        let wide = len(cols.count);
        let to_of = |row: u64| {
            let first = len(row - part.rows.start);
            out.at
                + match out.orientation {
                    Orientation::Straight => first * out.stride,
                    Orientation::Transposed => first * out.element,
                }
        };
        let Some(quantized) = &matrix.scales else {
            let to = &mut bytes[to_of(rows.start)..];
            let height = len(rows.count);
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
                bytes: &payload[len(start - rows.start) * stride..],
                stride,
                rows: len(end - start),
                cols: wide,
                scales: Some(Scales {
                    values: &scratch.scales,
                    stride: len(scale_cols.count),
                    block: [len(block[0]), len(block[1])],
                    phase: [len(into % block[0]), len(cols.start % block[1])],
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
        band: &Band<SourceId>,
        rows: Span,
        cols: Span,
        orientation: Orientation,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let element = u64::try_from(quantized.scale.bytes()).expect("a few bytes");
        let row_bytes = quantized.cols * element;
        let stored = Stored {
            tensor: band.scale,
            rows: self.checkpoint.tensor(band.scale).bytes / row_bytes,
            row_bytes,
        };
        let (first, width) = (len(cols.start * element), len(cols.count * element));
        let dense = &mut scratch.scale_bytes;
        dense.resize(width * len(rows.count), 0);
        match self.slabs_for(orientation, stored, cols.count * element, rows.count) {
            Some(slabs) => {
                for band in stored.bands(rows.start, rows.count) {
                    let part = band.within(rows);
                    let used = cols.count * element * 8 * part.count;
                    let slab = slabs.get((self.checkpoint, self.counters), band, used, true)?;
                    let slab = slab.expect("it was waited for");
                    let from = slab.from_row(part.start).chunks(len(row_bytes));
                    let dense = &mut dense[len(part.start - rows.start) * width..];
                    for (to, row) in dense.chunks_mut(width).take(len(part.count)).zip(from) {
                        to.copy_from_slice(&row[first..first + width]);
                    }
                }
            }
            None => {
                let at = rows.start * row_bytes + cols.start * element;
                self.read_rows(band.scale, at, width, row_bytes, len(rows.count), dense)?;
            }
        }
        scratch.scales.resize(len(rows.count * cols.count), 0.0);
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
        let bytes = u64::try_from(width * rows).expect("a usize fits in 64 bits");
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
}

/// Where a dense box goes.
struct Out {
    at: usize,
    stride: usize,
    orientation: Orientation,
    element: usize,
    dtype: DType,
    /// Leading columns of the box that another request decodes too, where it is transposed.
    shared: u64,
}

impl Out {
    fn float(&self) -> Option<Float> {
        self.dtype.as_float()
    }
}

/// Bits of an element of the payload.
fn bits_of(matrix: &Matrix) -> u64 {
    match code_of(matrix) {
        Some(code) => u64::from(code.bits()),
        None => u64::from(matrix.dtype.bits()),
    }
}

fn stored_payload(matrix: &Matrix) -> Stored {
    let row_bytes = matrix.cols() * bits_of(matrix) / 8;
    Stored { tensor: matrix.payload, rows: matrix.rows(), row_bytes }
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
