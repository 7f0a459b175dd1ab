//! The engine: a plan, the checkpoint that it reads, and a cache of decoded chunks.
//!
//! A read of many whole rows is decoded in place, smaller ones are served from chunks. What a reader
//! that goes forward will want next is begun before it asks.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use super::ReadError;
use super::ahead::Ahead;
use super::buffer::Buffer;
use super::cache::{Bytes, Cache, Outcome, Wanted};
use super::chunk::{ChunkReader, Failure, LEADING, len};
use super::counters::{CounterSnapshot, Counters, add};
use super::encode::Encoder;
use super::placement::transposes;
use super::slabs::{Keep, Slabs};
use super::streams::{Streams, Unit};
use crate::plan::{
    Body, ChunkBox, Computed, Encoded, Grid, MatrixId, Origin, Plan, Run, TensorId, TensorPlan,
};
use crate::source::Checkpoint;

/// Most bytes of stored rows that are kept for the next chunk, or asked for ahead of strips.
const MAX_SLAB_BYTES: u64 = 256 << 20;

/// Bytes from which on a read is decoded in place.
const IN_PLACE: u64 = 512 << 10;

/// Bytes up to which a read that nothing leads to is decoded alone, without the rest of its chunk.
const ALONE: u64 = 64 << 10;

/// Bytes that are decoded in place at a time: they stay in a core's L2 cache until the kernel
/// copies them.
const AT_A_TIME: u64 = 1 << 20;

/// Chunks that are made ahead of a reader that goes forward.
const CHUNKS_AHEAD: u64 = 4;

/// What an engine may use.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Bytes of decoded chunks that are kept, those being decoded included.
    pub cache_bytes: u64,
    /// Whether readers bypass the kernel's page cache, which else keeps what they were given and reads
    /// ahead: then a chunk is kept after small reads were given all of it, and chunks are made ahead
    /// of a single reader.
    pub keep_given: bool,
    /// Threads that work ahead of readers; they start when there is something to do. With none,
    /// readers do everything themselves.
    pub threads: usize,
}

/// Serves the bytes of a plan's tensors.
pub struct Engine {
    core: Arc<Core>,
    streams: Streams,
    /// Reads of made tensors that are under way.
    active: AtomicUsize,
    /// How many reads without another under way are left until a reader counts as the only one.
    crowd: AtomicU32,
    ahead: Ahead<Job>,
}

/// Something that a reader will want.
enum Job {
    /// A chunk of a tensor.
    Chunk(TensorId, u64, Keep),
    /// The stored rows that a plane of a tensor is made of.
    Rows(TensorId, u64),
}

/// What readers and those who work ahead of them share.
struct Core {
    checkpoint: Arc<Checkpoint>,
    plan: Arc<Plan>,
    chunks: Cache<(TensorId, u64), ReadError>,
    keep_given: bool,
    slabs: Slabs,
    counters: Counters,
    /// For each matrix, whether it was read.
    touched: Box<[AtomicBool]>,
}

thread_local! {
    /// Rows of which a read wants not all bytes.
    static ROWS: RefCell<Buffer> = RefCell::default();
}

impl Engine {
    /// An engine with an empty cache. `plan` was built from `checkpoint`.
    pub fn new(checkpoint: Arc<Checkpoint>, plan: Arc<Plan>, options: EngineOptions) -> Engine {
        let touched = plan.matrices.iter().map(|_| AtomicBool::new(false)).collect();
        // One expert's gate and up of the largest models are 32 MiB; more than a few are not read at
        // a time.
        let slab_bytes = (options.cache_bytes / 4).min(MAX_SLAB_BYTES);
        let core = Arc::new(Core {
            checkpoint,
            plan,
            chunks: Cache::new(options.cache_bytes - slab_bytes, Buffer::new),
            keep_given: options.keep_given,
            slabs: Slabs::new(slab_bytes),
            counters: Counters::default(),
            touched,
        });
        let working = Arc::clone(&core);
        let ahead = Ahead::new(options.threads, move |job| working.work(&job));
        Engine {
            core,
            streams: Streams::default(),
            active: AtomicUsize::new(0),
            crowd: AtomicU32::new(0),
            ahead,
        }
    }

    /// The plan that it serves.
    pub fn plan(&self) -> &Plan {
        &self.core.plan
    }

    /// The checkpoint that it reads.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.core.checkpoint
    }

    /// Its counters now.
    pub fn counters(&self) -> CounterSnapshot {
        let Core { chunks, slabs, counters, .. } = &*self.core;
        counters.snapshot(chunks.bytes() + slabs.bytes(), chunks.budget() + slabs.budget())
    }

    /// Reads bytes `at..at + out.len()` of a tensor of the view.
    ///
    /// # Errors
    /// A read that leaves the tensor, and what the source fails with. What `out` holds then is not
    /// defined.
    pub fn read(&self, id: TensorId, at: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let core = &*self.core;
        let tensor = core.plan.tensor(id);
        let bytes = u64::try_from(out.len()).expect("a usize fits in 64 bits");
        let size = tensor.bytes();
        add(&core.counters.reads, 1);
        let done = if at.checked_add(bytes).is_none_or(|end| end > size) {
            Err(ReadError::OutOfRange { tensor: tensor.name.clone(), at, bytes, size })
        } else {
            match &tensor.body {
                Body::Verbatim(runs) => core.verbatim(tensor, runs, at, out),
                Body::Computed(computed) => {
                    self.counted(id, tensor, Made::Computed(computed), at, out)
                }
                Body::Encoded(encoded) => self.counted(id, tensor, Made::Encoded(encoded), at, out),
                Body::Literal(bytes) => {
                    let start = len(at);
                    out.copy_from_slice(&bytes[start..start + out.len()]);
                    Ok(())
                }
            }
        };
        match &done {
            Ok(()) => add(&core.counters.served_bytes, bytes),
            Err(_) => add(&core.counters.errors, 1),
        }
        done
    }

    /// [`Engine::made`], counted while it lasts.
    fn counted(
        &self,
        id: TensorId,
        tensor: &TensorPlan,
        made: Made<'_>,
        at: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let others = self.active.fetch_add(1, Ordering::Relaxed);
        let crowd = self.crowd.load(Ordering::Relaxed);
        let crowd = if others > 0 { CROWD } else { crowd.saturating_sub(1) };
        self.crowd.store(crowd, Ordering::Relaxed);
        let done = self.made(id, tensor, made, at, out, crowd == 0);
        self.active.fetch_sub(1, Ordering::Relaxed);
        done
    }

    /// Reads from a tensor whose bytes are made; `alone` where one reader reads such tensors.
    fn made(
        &self,
        id: TensorId,
        tensor: &TensorPlan,
        made: Made<'_>,
        at: u64,
        out: &mut [u8],
        alone: bool,
    ) -> Result<(), ReadError> {
        if out.is_empty() {
            return Ok(());
        }
        let (core, grid) = (&*self.core, made.grid());
        let end = at + to_u64(out.len());
        let run = self.streams.advance(id, at, end).run;
        let plane_bytes = grid.rows * grid.row_bytes;
        if let Made::Computed(computed) = made {
            let behind = (end / plane_bytes).saturating_sub(PLANES_BEHIND);
            for plane in self.streams.ask(id, Unit::Behind, behind, PLANES_BEHIND) {
                core.forget_rows(tensor, computed, plane);
            }
        }
        if run >= PLANES_BEFORE_ROWS_AHEAD * plane_bytes {
            let planes =
                self.streams.ask(id, Unit::Plane, (end / plane_bytes + 2).min(grid.planes), 1);
            self.ahead.push(planes.map(|plane| Job::Rows(id, plane)));
        }
        let (mut now, mut left) = (at, out);
        let (mut in_place, mut keep) = (false, Keep::Nothing);
        while !left.is_empty() {
            let within = now % plane_bytes;
            let here = (plane_bytes - within).min(to_u64(left.len()));
            let run = run + (now - at);
            keep = if run >= PLANES_BEFORE_ROWS_AHEAD * plane_bytes {
                Keep::Rows
            } else if run >= GOES_ON && plane_bytes - within >= LEADING.min(plane_bytes / 2) {
                Keep::Part
            } else {
                Keep::Nothing
            };
            let part = Part { plane: now / plane_bytes, at: within, keep };
            let size = here.min(AT_A_TIME);
            let (out, _) = left.split_at_mut(len(size));
            let rows = here >= IN_PLACE && size >= 2 * grid.row_bytes;
            let page = run == 0 && size <= ALONE;
            in_place |= rows;
            let here = match made {
                Made::Computed(computed)
                    if (rows || page) && !core.chunks.has(&(id, grid.chunk_at(now))) =>
                {
                    core.in_place(tensor, computed, part, out)?
                }
                Made::Computed(_) | Made::Encoded(_) => {
                    core.copy_chunk(id, tensor, made, part, left, rows)?
                }
            };
            now += to_u64(here);
            left = &mut left[here..];
        }
        // A single reader without the kernel's read-ahead waits for one core while others idle.
        let single = core.keep_given && alone;
        if run > 0 && (!in_place || single) {
            let chunk = grid.chunk_at(end - 1);
            let until = (chunk + 1 + CHUNKS_AHEAD).min(grid.chunks());
            let chunks = self.streams.ask(id, Unit::Chunk, until, CHUNKS_AHEAD);
            self.ahead.push(chunks.map(|chunk| Job::Chunk(id, chunk, keep)));
        }
        Ok(())
    }
}

/// Planes that a reader went through without a gap before the stored rows of the next are read
/// ahead of it, and strips no longer alone.
const PLANES_BEFORE_ROWS_AHEAD: u64 = 10;

/// Bytes that a reader went through before it is expected to want more columns than it asks for: the
/// kernel reads 2 MiB around the first page of a map that is touched.
const GOES_ON: u64 = 2 << 20;

/// Reads in a row without another under way that make a reader the only one.
const CROWD: u32 = 32;

/// Planes that may still be read when a reader has gone on to another: readers with several threads
/// read pieces of 8 MiB in no order, 8 of them two planes of the largest experts.
const PLANES_BEHIND: u64 = 1;

/// A body with a grid: its bytes are made.
#[derive(Clone, Copy)]
enum Made<'a> {
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

    fn grid(self) -> &'a Grid {
        match self {
            Made::Computed(computed) => &computed.grid,
            Made::Encoded(encoded) => &encoded.grid,
        }
    }
}

/// What of a plane is read.
#[derive(Clone, Copy)]
struct Part {
    plane: u64,
    /// First byte within the plane.
    at: u64,
    /// What of the stored rows is read and kept.
    keep: Keep,
}

impl Core {
    /// Does a job. What fails is left for the reader to meet.
    fn work(&self, job: &Job) {
        match *job {
            Job::Chunk(id, chunk, keep) => {
                let tensor = self.plan.tensor(id);
                if let Some(made) = Made::of(&tensor.body)
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

    fn verbatim(
        &self,
        tensor: &TensorPlan,
        runs: &[Run],
        at: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let mut at = at;
        let mut left = out;
        let first = runs.partition_point(|r| r.at + r.bytes <= at);
        for run in &runs[first..] {
            if left.is_empty() {
                break;
            }
            let into = at - run.at;
            let here = usize::try_from(run.bytes - into).map_or(left.len(), |n| n.min(left.len()));
            let (now, later) = left.split_at_mut(here);
            self.of(run.origin)
                .read(run.source, run.offset + into, now)
                .map_err(|e| failed(tensor, e))?;
            let n = u64::try_from(here).expect("a usize fits in 64 bits");
            add(&self.counters.verbatim_bytes, n);
            add(&self.counters.source_bytes, n);
            at += n;
            left = later;
        }
        Ok(())
    }

    fn of(&self, origin: Origin) -> &Checkpoint {
        match (origin, &self.plan.original) {
            (Origin::Original, Some(original)) => original,
            (Origin::Source | Origin::Original, _) => &self.checkpoint,
        }
    }

    /// Decodes bytes of a plane without a chunk, and gives how many there were.
    fn in_place(
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
            let bytes = len(rows * row_bytes);
            buffer.grow(bytes);
            let buffer = &mut buffer[..bytes];
            self.decode(tensor, computed, chunk, reader, buffer)?;
            out.copy_from_slice(&buffer[len(part.at - first * row_bytes)..][..out.len()]);
            Ok(out.len())
        })
    }

    /// Copies from the chunk that holds the first byte of a part, and gives how many there were.
    fn copy_chunk(
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
        let into = len(at - grid.extent(chunk).0);
        let n = (bytes.len() - into).min(out.len());
        out[..n].copy_from_slice(&bytes[into..into + n]);
        drop(bytes);
        if large || !self.keep_given {
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
        let wanted = Wanted { key: (id, chunk), len: len(bytes), uses: bytes };
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
        // A cold disk works on the next plane while this one is copied.
        if plane + 1 < computed.grid.planes {
            reader.expect(computed, matrix_of, &tensor.shape, plane + 1);
        }
        reader.load(computed, matrix_of, &tensor.shape, plane).map_err(|e| failed(tensor, e))
    }

    /// Lets go of the stored rows that a plane is a transpose of.
    fn forget_rows(&self, tensor: &TensorPlan, computed: &Computed, plane: u64) {
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
    ) -> Result<[i64; 2], crate::source::ReadError> {
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

fn failed(tensor: &TensorPlan, failure: impl Into<Failure>) -> ReadError {
    match failure.into() {
        Failure::Source(source) => ReadError::Source { tensor: tensor.name.clone(), source },
        Failure::Abandoned => ReadError::Abandoned,
    }
}

fn to_u64(n: usize) -> u64 {
    u64::try_from(n).expect("a usize fits in 64 bits")
}
