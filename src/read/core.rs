//! What readers and those who work ahead of them share: how bytes of a plane are made, into a chunk
//! that is kept or where a reader wants them.

use crate::tensor::{to_u64, to_usize};
use std::cell::RefCell;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ReadError;
use super::buffer::Buffer;
use super::cache::{Bytes, Cache, Outcome, Wanted};
use super::chunk::{ChunkReader, Failure};
use super::counters::{Counters, add};
use super::encode::Encoder;
use super::engine::EngineOptions;
use super::placement::transposes;
use super::slabs::{Keep, MAX_SLAB_BYTES, Slabs};
use super::streams::Streams;
use crate::plan::{
    Body, ChunkBox, Computed, Encoded, Grid, MatrixId, Origin, Plan, SourceRange, TensorId,
    TensorPlan,
};
use crate::source::Checkpoint;

/// Something that a reader will want.
pub(super) enum Job {
    /// A chunk of a tensor.
    Chunk(TensorId, u64, Keep),
    /// The stored rows that a plane of a tensor is made of.
    Rows(TensorId, u64),
}

/// What readers and those who work ahead of them share.
pub(super) struct Core {
    pub checkpoint: Arc<Checkpoint>,
    pub plan: Arc<Plan>,
    pub chunks: Cache<(TensorId, u64), ReadError>,
    pub direct_io: bool,
    pub slabs: Slabs,
    pub streams: Streams,
    pub counters: Counters,
    /// For each matrix, whether it was read.
    touched: Box<[AtomicBool]>,
}

thread_local! {
    /// Rows of which a read wants not all bytes.
    static ROWS: RefCell<Buffer> = RefCell::default();
}

/// A body with a grid: its bytes are made.
#[derive(Clone, Copy)]
pub(super) enum Made<'a> {
    Computed(&'a Computed),
    Encoded(&'a Encoded),
}

impl<'a> Made<'a> {
    fn of(body: &'a Body) -> Option<Made<'a>> {
        match body {
            Body::Computed(computed) => Some(Made::Computed(computed)),
            Body::Encoded(encoded) => Some(Made::Encoded(encoded)),
            Body::Verbatim(_) | Body::Literal(_) => None,
        }
    }

    /// The grid.
    pub(super) fn grid(self) -> &'a Grid {
        match self {
            Made::Computed(computed) => &computed.grid,
            Made::Encoded(encoded) => &encoded.grid,
        }
    }
}

/// What of a plane is read.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub plane: u64,
    /// First byte within the plane.
    pub at: u64,
    /// What of the stored rows is read and kept.
    pub keep: Keep,
}

impl Core {
    /// With nothing kept yet.
    pub(super) fn new(
        checkpoint: Arc<Checkpoint>,
        plan: Arc<Plan>,
        options: EngineOptions,
    ) -> Core {
        let touched = plan.matrices.iter().map(|_| AtomicBool::new(false)).collect();
        let slab_bytes = (options.cache_bytes / 4).min(MAX_SLAB_BYTES);
        Core {
            checkpoint,
            plan,
            chunks: Cache::new(options.cache_bytes - slab_bytes, Buffer::new),
            direct_io: options.direct_io,
            slabs: Slabs::new(slab_bytes),
            streams: Streams::default(),
            counters: Counters::default(),
            touched,
        }
    }

    /// Does a job. What fails is left for the reader to meet.
    pub(super) fn work(&self, job: &Job) {
        match *job {
            Job::Chunk(id, chunk, keep) => {
                let tensor = self.plan.tensor(id);
                // Where its reader was faster, it decodes the chunk itself.
                if let Some(made) = Made::of(&tensor.body)
                    && !self.streams.passed(id, made.grid().extent(chunk).0)
                    && !self.chunks.has(&(id, chunk))
                {
                    let _ = self.chunk(id, tensor, made, chunk, keep);
                }
            }
            Job::Rows(id, plane) => {
                let tensor = self.plan.tensor(id);
                if let Body::Computed(computed) = &tensor.body {
                    let _ = self.load_rows(tensor, computed, plane);
                }
            }
        }
    }

    pub(super) fn verbatim(
        &self,
        tensor: &TensorPlan,
        runs: &[SourceRange],
        at: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let mut at = at;
        let mut left = out;
        for run in runs_from(runs, at) {
            if left.is_empty() {
                break;
            }
            let into = at - run.at;
            let here = usize::try_from(run.bytes - into).map_or(left.len(), |n| n.min(left.len()));
            let (now, later) = left.split_at_mut(here);
            self.of(run.origin)
                .read(run.source, run.offset + into, now)
                .map_err(|e| failed(tensor, e))?;
            let n = to_u64(here);
            self.counters.add_verbatim(n);
            at += n;
            left = later;
        }
        Ok(())
    }

    /// Where bytes `at..at + bytes` of a tensor that is made of `runs` lie in the source, where that
    /// is one place.
    pub(super) fn stored(&self, runs: &[SourceRange], at: u64, bytes: u64) -> Option<(&File, u64)> {
        let run = runs_from(runs, at).first()?;
        let into = at - run.at;
        let checkpoint = self.of(run.origin);
        (bytes <= run.bytes - into)
            .then(|| checkpoint.file_range(run.source, run.offset + into, bytes))
            .flatten()
    }

    fn of(&self, origin: Origin) -> &Checkpoint {
        match (origin, &self.plan.original) {
            (Origin::Original, Some(original)) => original,
            (Origin::Source | Origin::Original, _) => &self.checkpoint,
        }
    }

    /// Decodes bytes of a plane without a chunk, and gives how many there were.
    pub(super) fn in_place(
        &self,
        tensor: &TensorPlan,
        computed: &Computed,
        part: Part,
        out: &mut [u8],
    ) -> Result<usize, ReadError> {
        let Grid { row_bytes, rows, .. } = computed.grid;
        let end = part.at + to_u64(out.len());
        // Codes of 4 bits lie two to a byte: rows that are their columns start at an even one.
        let first = (part.at / row_bytes) & !1;
        let rows = end.div_ceil(row_bytes).min(rows) - first;
        let chunk = ChunkBox { plane: part.plane, row: first, rows };
        add(&self.counters.decoded_bytes, rows * row_bytes);
        let reader = self.reader(part.keep);
        if part.at == first * row_bytes && end == (first + rows) * row_bytes {
            self.decode(tensor, computed, chunk, reader, out)?;
            return Ok(out.len());
        }
        let into = part.at % row_bytes;
        let one_row = into + to_u64(out.len()) <= row_bytes;
        let reader =
            ChunkReader { bytes: one_row.then(|| (into, into + to_u64(out.len()))), ..reader };
        ROWS.with_borrow_mut(|buffer| {
            let bytes = to_usize(rows * row_bytes);
            buffer.grow(bytes);
            let buffer = &mut buffer[..bytes];
            self.decode(tensor, computed, chunk, reader, buffer)?;
            out.copy_from_slice(&buffer[to_usize(part.at - first * row_bytes)..][..out.len()]);
            Ok(out.len())
        })
    }

    /// Copies from the chunk that holds the first byte of a part, and gives how many there were.
    pub(super) fn copy_chunk(
        &self,
        id: TensorId,
        tensor: &TensorPlan,
        made: Made<'_>,
        part: Part,
        out: &mut [u8],
        large: bool,
    ) -> Result<usize, ReadError> {
        let grid = made.grid();
        let at = part.plane * grid.rows * grid.row_bytes + part.at;
        let chunk = grid.chunk_at(at);
        let (bytes, outcome) = self.chunk(id, tensor, made, chunk, part.keep)?;
        match outcome {
            Outcome::Hit => add(&self.counters.chunk_hits, 1),
            Outcome::Waited => add(&self.counters.chunk_waits, 1),
            Outcome::Made => add(&self.counters.chunk_misses, 1),
        }
        let into = to_usize(at - grid.extent(chunk).0);
        let n = (bytes.len() - into).min(out.len());
        out[..n].copy_from_slice(&bytes[into..into + n]);
        drop(bytes);
        if large || !self.direct_io {
            self.chunks.given(&(id, chunk), to_u64(n));
        }
        Ok(n)
    }

    /// A chunk, from the cache or made.
    fn chunk(
        &self,
        id: TensorId,
        tensor: &TensorPlan,
        made: Made<'_>,
        chunk: u64,
        keep: Keep,
    ) -> Result<(Bytes, Outcome), ReadError> {
        let grid = made.grid();
        let bytes = grid.extent(chunk).1;
        let wanted = Wanted { key: (id, chunk), len: to_usize(bytes), uses: bytes };
        let place = grid.chunk_box(chunk);
        self.chunks.get(wanted, ReadError::Abandoned, |buffer| {
            add(&self.counters.decoded_bytes, bytes);
            match made {
                Made::Computed(computed) => {
                    self.decode(tensor, computed, place, self.reader(keep), buffer)
                }
                Made::Encoded(encoded) => self.encode(tensor, encoded, place, keep, buffer),
            }
        })
    }

    fn decode(
        &self,
        tensor: &TensorPlan,
        computed: &Computed,
        chunk: ChunkBox,
        reader: ChunkReader<'_>,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        self.touch_all(tensor, computed, chunk.plane)?;
        reader
            .fill(computed, |id| self.plan.matrix(id), &tensor.shape, tensor.dtype, chunk, out)
            .map_err(|e| failed(tensor, e))
    }

    fn encode(
        &self,
        tensor: &TensorPlan,
        encoded: &Encoded,
        chunk: ChunkBox,
        keep: Keep,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let quantized = self.plan.quantized(encoded.quantized);
        for member in &quantized.members {
            for fragment in &member.values.fragments {
                self.touch(tensor, fragment.matrix, transposes(&fragment.map))?;
            }
        }
        let encoder = Encoder {
            reader: self.reader(keep),
            original: self.plan.original.as_deref(),
            matrix_of: |id| self.plan.matrix(id),
            quantized,
        };
        encoder.fill(encoded, chunk, out).map_err(|e| failed(tensor, e))
    }

    fn reader(&self, keep: Keep) -> ChunkReader<'_> {
        ChunkReader {
            checkpoint: &self.checkpoint,
            counters: &self.counters,
            slabs: &self.slabs,
            keep,
            bytes: None,
        }
    }

    /// Reads the stored rows that a plane is a transpose of, for chunks to come.
    fn load_rows(
        &self,
        tensor: &TensorPlan,
        computed: &Computed,
        plane: u64,
    ) -> Result<(), ReadError> {
        self.touch_all(tensor, computed, plane)?;
        let (reader, matrix_of) = (self.reader(Keep::Rows), |id| self.plan.matrix(id));
        reader.load(computed, matrix_of, &tensor.shape, plane).map_err(|e| failed(tensor, e))
    }

    /// Lets go of the stored rows that a plane is a transpose of.
    pub(super) fn forget_rows(&self, tensor: &TensorPlan, computed: &Computed, plane: u64) {
        let matrix_of = |id| self.plan.matrix(id);
        self.reader(Keep::Nothing).forget(computed, matrix_of, &tensor.shape, plane);
    }

    fn touch_all(
        &self,
        tensor: &TensorPlan,
        computed: &Computed,
        plane: u64,
    ) -> Result<(), ReadError> {
        let fragments = computed.fragments_of(plane);
        fragments.iter().try_for_each(|f| self.touch(tensor, f.matrix, transposes(&f.map)))
    }

    /// [`Core::first_touch`], once for each matrix.
    fn touch(&self, tensor: &TensorPlan, id: MatrixId, strips: bool) -> Result<(), ReadError> {
        let touched = &self.touched[id.index()];
        if !touched.load(Ordering::Acquire) {
            self.first_touch(tensor, id, strips)?;
            touched.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Before the first decoding of a matrix: checks the extents that its shape tensor states, and
    /// asks for its payload where that is one matrix and will be read in strips.
    fn first_touch(
        &self,
        tensor: &TensorPlan,
        id: MatrixId,
        strips: bool,
    ) -> Result<(), ReadError> {
        let matrix = self.plan.matrix(id);
        if let Some(shape_tensor) = matrix.shape_tensor {
            let got = self.stated_shape(shape_tensor).map_err(|e| failed(tensor, e))?;
            let dims = matrix.shape.dims();
            let same = dims.len() == 2 && (0..2).all(|i| u64::try_from(got[i]) == Ok(dims[i]));
            if !same {
                return Err(ReadError::StatedShape {
                    tensor: tensor.name.clone(),
                    matrix: matrix.name.clone(),
                    expected: matrix.shape.to_string(),
                    got,
                });
            }
        }
        // The experts of a whole layer in one payload are more than one strip wants.
        let bytes = self.checkpoint.tensor(matrix.payload).bytes;
        if strips && bytes <= MAX_SLAB_BYTES {
            self.checkpoint.will_need(matrix.payload, 0, bytes);
        }
        Ok(())
    }

    /// The two integers of a shape tensor, I32 or I64: the planner checked that.
    fn stated_shape(
        &self,
        id: crate::source::SourceId,
    ) -> Result<[i64; 2], crate::source::SourceReadError> {
        let mut bytes = [0; 16];
        let size = usize::try_from(self.checkpoint.tensor(id).bytes).map_or(16, |n| n.min(16));
        self.checkpoint.read(id, 0, &mut bytes[..size])?;
        let width = size / 2;
        Ok([0, 1].map(|i| {
            let number = &bytes[i * width..(i + 1) * width];
            let negative = number.last().is_some_and(|b| b & 0x80 != 0);
            let mut wide = [if negative { 0xFF } else { 0 }; 8];
            wide[..width].copy_from_slice(number);
            i64::from_le_bytes(wide)
        }))
    }
}

/// The runs from the one on that holds byte `at` of their tensor.
fn runs_from(runs: &[SourceRange], at: u64) -> &[SourceRange] {
    &runs[runs.partition_point(|r| r.at + r.bytes <= at)..]
}

fn failed(tensor: &TensorPlan, failure: impl Into<Failure>) -> ReadError {
    match failure.into() {
        Failure::Source(source) => ReadError::Source { tensor: tensor.name.clone(), source },
        Failure::Abandoned => ReadError::Abandoned,
    }
}
