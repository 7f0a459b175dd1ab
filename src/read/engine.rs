//! The engine: a plan, the checkpoint that it reads, and a cache of decoded chunks.
//!
//! A read of many whole rows is decoded in place, since the kernel keeps what it was given. Smaller
//! reads, and all reads where the kernel keeps nothing, are served from chunks. What a reader that
//! goes forward will want next is begun before it asks.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ReadError;
use super::ahead::Ahead;
use super::buffer::Buffer;
use super::cache::{Bytes, Cache, Outcome, Wanted};
use super::chunk::{ChunkReader, Failure, len};
use super::counters::{CounterSnapshot, Counters, add};
use super::encode::Encoder;
use super::placement::transposes;
use super::slabs::Slabs;
use super::streams::{Streams, Unit};
use crate::plan::{
    Body, ChunkBox, Computed, Encoded, Grid, MatrixId, Origin, Plan, Run, TensorId, TensorPlan,
};
use crate::source::Checkpoint;

/// Most bytes of stored rows that are kept for the next chunk, or asked for ahead of strips.
const MAX_SLAB_BYTES: u64 = 256 << 20;

/// Bytes from which on a read is decoded in place, where the kernel keeps what it is given.
const IN_PLACE: u64 = 512 << 10;

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
    /// Whether a chunk is kept after every byte of it was given to a reader: for readers that
    /// bypass the kernel's page cache, which keeps it for all others.
    pub keep_given: bool,
    /// Threads that work ahead of readers; they start when there is something to do. With none,
    /// readers do everything themselves.
    pub threads: usize,
}

/// Serves the bytes of a plan's tensors.
pub struct Engine {
    core: Arc<Core>,
    streams: Streams,
    ahead: Ahead<Job>,
}

/// Something that a reader will want.
enum Job {
    /// A chunk of a tensor.
    Chunk(TensorId, u64),
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
        Engine { core, streams: Streams::default(), ahead }
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
                    self.made(id, tensor, Made::Computed(computed), at, out)
                }
                Body::Encoded(encoded) => self.made(id, tensor, Made::Encoded(encoded), at, out),
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

    /// Reads from a tensor whose bytes are made.
    fn made(
        &self,
        id: TensorId,
        tensor: &TensorPlan,
        made: Made<'_>,
        at: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        if out.is_empty() {
            return Ok(());
        }
        let (core, grid) = (&*self.core, made.grid());
        let end = at + to_u64(out.len());
        let run = self.streams.advance(id, at, end).run;
        let plane_bytes = grid.rows * grid.row_bytes;
        if run >= PLANES_BEFORE_ROWS_AHEAD * plane_bytes {
            let planes =
                self.streams.ask(id, Unit::Plane, (end / plane_bytes + 2).min(grid.planes), 1);
            self.ahead.push(planes.map(|plane| Job::Rows(id, plane)));
        }
        let (mut now, mut left) = (at, out);
        let mut in_place = false;
        while !left.is_empty() {
            let within = now % plane_bytes;
            let here = (plane_bytes - within).min(to_u64(left.len()));
            // Bytes that this reader has read of this plane, or so many planes that it will go on.
            let run = run + (now - at);
            let part = Part {
                plane: now / plane_bytes,
                at: within,
                slabs: run.min(within) >= BYTES_BEFORE_SLABS
                    || run >= PLANES_BEFORE_ROWS_AHEAD * plane_bytes,
            };
            let now_made = here.min(AT_A_TIME);
            let worth = !core.keep_given && here >= IN_PLACE && now_made >= 2 * grid.row_bytes;
            let here = match made {
                Made::Computed(computed) if worth => {
                    let (out, _) = left.split_at_mut(len(now_made));
                    core.in_place(tensor, computed, part, out)?;
                    in_place = true;
                    out.len()
                }
                Made::Computed(_) | Made::Encoded(_) => {
                    core.from_chunk(id, tensor, made, part, left)?
                }
            };
            now += to_u64(here);
            left = &mut left[here..];
        }
        if !in_place && run > 0 {
            let chunk = grid.chunk_at(end - 1);
            let until = (chunk + 1 + CHUNKS_AHEAD).min(grid.chunks());
            let chunks = self.streams.ask(id, Unit::Chunk, until, CHUNKS_AHEAD);
            self.ahead.push(chunks.map(|chunk| Job::Chunk(id, chunk)));
        }
        Ok(())
    }
}

/// Planes that a reader went through without a gap before the stored rows of the next are read
/// ahead of it, and strips no longer alone.
const PLANES_BEFORE_ROWS_AHEAD: u64 = 10;

/// Bytes of a plane that a reader went through before stored rows are read whole for it.
const BYTES_BEFORE_SLABS: u64 = 1 << 20;

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
    /// Whether the reader has come far enough for stored rows to be read whole.
    slabs: bool,
}

impl Core {
    /// Does a job. What fails is left for the reader to meet.
    fn work(&self, job: &Job) {
        match *job {
            Job::Chunk(id, chunk) => {
                let tensor = self.plan.tensor(id);
                if let Some(made) = Made::of(&tensor.body)
                    && !self.chunks.has(&(id, chunk))
                {
                    let _ = self.chunk(id, tensor, made, chunk, true);
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

    /// Decodes bytes of a plane where they belong.
    fn in_place(
        &self,
        tensor: &TensorPlan,
        computed: &Computed,
        part: Part,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let Grid { row_bytes, rows, .. } = computed.grid;
        let end = part.at + to_u64(out.len());
        // Codes of 4 bits lie two to a byte: rows that are their columns start at an even one.
        let first = part.at / row_bytes & !1;
        let rows = end.div_ceil(row_bytes).min(rows) - first;
        let chunk = ChunkBox { plane: part.plane, row: first, rows };
        add(&self.counters.decoded_bytes, rows * row_bytes);
        if part.at == first * row_bytes && end == (first + rows) * row_bytes {
            return self.decode(tensor, computed, chunk, part.slabs, 0, out);
        }
        ROWS.with_borrow_mut(|buffer| {
            let bytes = len(rows * row_bytes);
            buffer.grow(bytes);
            let rows_of_it = &mut buffer[..bytes];
            let shared = part.at.div_ceil(row_bytes) - first;
            self.decode(tensor, computed, chunk, part.slabs, shared, rows_of_it)?;
            let skip = len(part.at - first * row_bytes);
            out.copy_from_slice(&rows_of_it[skip..skip + out.len()]);
            Ok(())
        })
    }

    /// Copies from the chunk that holds the first byte of a part, and gives how many there were.
    fn from_chunk(
        &self,
        id: TensorId,
        tensor: &TensorPlan,
        made: Made<'_>,
        part: Part,
        out: &mut [u8],
    ) -> Result<usize, ReadError> {
        let grid = made.grid();
        let at = part.plane * grid.rows * grid.row_bytes + part.at;
        let chunk = grid.chunk_at(at);
        let (bytes, outcome) = self.chunk(id, tensor, made, chunk, part.slabs)?;
        match outcome {
            Outcome::Hit => add(&self.counters.chunk_hits, 1),
            Outcome::Waited => add(&self.counters.chunk_waits, 1),
            Outcome::Made => add(&self.counters.chunk_misses, 1),
        }
        let into = len(at - grid.extent(chunk).0);
        let n = (bytes.len() - into).min(out.len());
        out[..n].copy_from_slice(&bytes[into..into + n]);
        drop(bytes);
        if !self.keep_given {
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
        slabs: bool,
    ) -> Result<(Bytes, Outcome), ReadError> {
        let grid = made.grid();
        let bytes = grid.extent(chunk).1;
        let wanted = Wanted { key: (id, chunk), len: len(bytes), uses: bytes };
        let place = grid.chunk_box(chunk);
        self.chunks.get(wanted, ReadError::Abandoned, |buffer| {
            add(&self.counters.decoded_bytes, bytes);
            match made {
                Made::Computed(computed) => self.decode(tensor, computed, place, slabs, 0, buffer),
                Made::Encoded(encoded) => self.encode(tensor, encoded, place, slabs, buffer),
            }
        })
    }

    fn decode(
        &self,
        tensor: &TensorPlan,
        computed: &Computed,
        chunk: ChunkBox,
        slabs: bool,
        shared_rows: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        self.touch_all(tensor, computed, chunk.plane)?;
        ChunkReader { shared_rows, ..self.reader(slabs) }
            .fill(computed, |id| self.plan.matrix(id), &tensor.shape, tensor.dtype, chunk, out)
            .map_err(|e| failed(tensor, e))
    }

    fn encode(
        &self,
        tensor: &TensorPlan,
        encoded: &Encoded,
        chunk: ChunkBox,
        slabs: bool,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let quantized = self.plan.quantized(encoded.quantized);
        for member in &quantized.members {
            for fragment in &member.values.fragments {
                self.touch(tensor, fragment.matrix, transposes(&fragment.map))?;
            }
        }
        let encoder = Encoder {
            reader: self.reader(slabs),
            original: self.plan.original.as_deref(),
            matrix_of: |id| self.plan.matrix(id),
            quantized,
        };
        encoder.fill(encoded, chunk, out).map_err(|e| failed(tensor, e))
    }

    fn reader(&self, slabs: bool) -> ChunkReader<'_> {
        ChunkReader {
            checkpoint: &self.checkpoint,
            counters: &self.counters,
            slabs: slabs.then_some(&self.slabs),
            shared_rows: 0,
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
        self.reader(true)
            .load(computed, |id| self.plan.matrix(id), &tensor.shape, plane)
            .map_err(|e| failed(tensor, e))
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
