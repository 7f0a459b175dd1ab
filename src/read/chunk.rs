//! Decodes one chunk of a computed tensor: every fragment that reaches into it, into place.

use std::cell::RefCell;
use std::sync::Arc;

use super::cache::{Buffer, Cache, Outcome};
use super::counters::{Counters, add};
use super::placement::{Placement, Span, placements};
use crate::codec::{Code, Orientation, Scales, Tile, copy2d, decode, scale_to_f32};
use crate::plan::{ChunkBox, Computed, Matrix, MatrixId, MatrixScales};
use crate::source::{Checkpoint, ReadError, SourceId};
use crate::tensor::{DType, Float, Shape};

/// Buffers that a thread keeps from chunk to chunk.
#[derive(Default)]
struct Scratch {
    payload: Vec<u8>,
    scale_bytes: Vec<u8>,
    scales: Vec<f32>,
    decoded: Vec<u8>,
    /// Whether transposed strips are read from slabs.
    slabs: bool,
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

/// Rows of a matrix, whole, as the checkpoint stores them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlabKey {
    payload: SourceId,
    row: u64,
    rows: u64,
}

/// Stored rows that several transposed chunks are decoded from.
pub type Slabs = Cache<SlabKey, Failure>;

/// A slab while a strip of it is decoded; when every strip was, it goes.
struct Slab<'a> {
    bytes: Arc<Buffer>,
    key: SlabKey,
    given: u64,
    slabs: &'a Slabs,
}

impl Drop for Slab<'_> {
    fn drop(&mut self) {
        self.bytes = Arc::default();
        self.slabs.given(&self.key, self.given);
    }
}

/// Strips of a matrix that are this part of its width or more are read as they are.
const WIDE_STRIP: u64 = 2;

/// What a chunk is decoded from and counted in.
pub struct ChunkReader<'a> {
    pub checkpoint: &'a Checkpoint,
    pub counters: &'a Counters,
    /// A chunk of a transposed matrix is a narrow strip of its rows: 2048 runs of 128 bytes cost
    /// 1 ms and more in system calls (`cargo test --lib cost_of_a_run -- --ignored --nocapture`),
    /// the whole 8 MiB are read in as much. So from the second chunk on, the rows are read whole
    /// and kept for the next.
    pub slabs: &'a Slabs,
    /// For each matrix, whether it is read for the first time, and so perhaps for the last.
    pub first_read: &'a dyn Fn(MatrixId) -> bool,
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
                scratch.slabs = !(self.first_read)(fragment.matrix);
                for p in placements(fragment, matrix, shape, chunk) {
                    let mut place = Place { out, row_bytes, element, dtype };
                    self.place(matrix, &p, &mut place, scratch)?;
                }
            }
            Ok(())
        })
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
        let out = Out { at, stride, orientation, element: place.element, dtype: place.dtype };
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
        let out = Out { at: 0, stride, orientation, element, dtype: place.dtype };
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
        let Scratch { payload, scale_bytes, scales, slabs, .. } = scratch;
        let bits = match code_of(matrix) {
            Some(code) => u64::from(code.bits()),
            None => u64::from(matrix.dtype.bits()),
        };
        let row_bytes = matrix.cols() * bits / 8;
        let width = len((cols.count * bits).div_ceil(8));
        let height = len(rows.count);
        let slab = if *slabs && out.orientation == Orientation::Transposed {
            self.slab(matrix, rows, row_bytes, u64::try_from(width).expect("a usize"))?
        } else {
            None
        };
        let (payload, stride) = match &slab {
            Some(slab) => (&slab.bytes[len(cols.start * bits / 8)..], len(row_bytes)),
            None => {
                payload.resize((width * height).max(payload.len()), 0);
                let at = rows.start * row_bytes + cols.start * bits / 8;
                self.read_rows(matrix.payload, at, width, row_bytes, height, payload)?;
                (payload.as_slice(), width)
            }
        };
        let Some(quantized) = &matrix.scales else {
            let to = &mut bytes[out.at..];
            match (matrix.dtype.as_float(), out.float()) {
                (Some(from), Some(float)) if from.dtype() != float.dtype() => {
                    let code = code_of_float(from);
                    let (rows, cols) = (height, len(cols.count));
                    let tile = Tile { code, bytes: payload, stride, rows, cols, scales: None };
                    decode(&tile, float, out.orientation, to, out.stride);
                }
                _ => {
                    let cols = len(cols.count);
                    copy2d(
                        out.element,
                        payload,
                        stride,
                        height,
                        cols,
                        out.orientation,
                        to,
                        out.stride,
                    );
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
            let n_rows = len(scale_rows.1 - scale_rows.0 + 1);
            let n_cols = len(scale_cols.1 - scale_cols.0 + 1);
            let scale_width = quantized.scale.bytes();
            scale_bytes.resize(n_rows * n_cols * scale_width, 0);
            let scale_element = u64::try_from(scale_width).expect("a few bytes");
            let at = ((band.row + scale_rows.0) * quantized.cols + scale_cols.0) * scale_element;
            let row = quantized.cols * scale_element;
            self.read_rows(band.scale, at, n_cols * scale_width, row, n_rows, scale_bytes)?;
            scales.resize(n_rows * n_cols, 0.0);
            scale_to_f32(quantized.scale, scale_bytes, scales);
            let first = len(start - rows.start);
            let tile = Tile {
                code: quantized.code(),
                bytes: &payload[first * stride..],
                stride,
                rows: len(end - start),
                cols: len(cols.count),
                scales: Some(Scales {
                    values: scales,
                    stride: n_cols,
                    block: [len(block[0]), len(block[1])],
                    phase: [len(into % block[0]), len(cols.start % block[1])],
                }),
            };
            let to = match out.orientation {
                Orientation::Straight => out.at + first * out.stride,
                Orientation::Transposed => out.at + first * out.element,
            };
            let float = out.float().expect("the planner gives quantized tensors a float dtype");
            decode(&tile, float, out.orientation, &mut bytes[to..], out.stride);
        }
        Ok(())
    }

    /// Stored rows of a matrix, whole; `None` where strips of `width` bytes are wide enough to be
    /// read alone, or the cache would not hold the rows beside others.
    fn slab(
        &self,
        matrix: &Matrix,
        rows: Span,
        row_bytes: u64,
        width: u64,
    ) -> Result<Option<Slab<'_>>, Failure> {
        let bytes = rows.count * row_bytes;
        if width * WIDE_STRIP >= row_bytes || bytes > self.slabs.budget() / 2 {
            return Ok(None);
        }
        let payload = matrix.payload;
        let key = SlabKey { payload, row: rows.start, rows: rows.count };
        let (slab, outcome) = self.slabs.get(key, len(bytes), Failure::Abandoned, |buffer| {
            add(&self.counters.source_bytes, bytes);
            self.checkpoint.read(payload, rows.start * row_bytes, buffer).map_err(Failure::from)
        })?;
        // The strip of the first chunk was read without a slab: whoever makes one counts it too.
        let strips = if outcome == Outcome::Made { 2 } else { 1 };
        Ok(Some(Slab { bytes: slab, key, given: strips * width * rows.count, slabs: self.slabs }))
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
}

impl Out {
    fn float(&self) -> Option<Float> {
        self.dtype.as_float()
    }
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
