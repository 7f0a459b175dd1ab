//! The engine: a plan, the checkpoint that it reads, and a cache of decoded chunks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::ReadError;
use super::cache::{Cache, Outcome};
use super::chunk::{ChunkReader, Failure, Slabs};
use super::counters::{CounterSnapshot, Counters, add};
use super::encode::Encoder;
use super::placement::transposes;
use crate::plan::{
    Body, Computed, Encoded, Fragment, Grid, MatrixId, Origin, Plan, Run, TensorId, TensorPlan,
};
use crate::source::Checkpoint;

/// Most bytes of stored rows that are kept for the next chunk, or asked for ahead of strips.
const MAX_SLAB_BYTES: u64 = 256 << 20;

/// What an engine may use.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Bytes of decoded chunks that are kept, those being decoded included.
    pub cache_bytes: u64,
    /// Whether a chunk is kept after every byte of it was given to a reader: for readers that
    /// bypass the kernel's page cache, which keeps it for all others.
    pub keep_given: bool,
}

/// Serves the bytes of a plan's tensors.
pub struct Engine {
    checkpoint: Arc<Checkpoint>,
    plan: Arc<Plan>,
    chunks: Cache<(TensorId, u64), ReadError>,
    keep_given: bool,
    slabs: Slabs,
    counters: Counters,
    /// For each matrix, how often it was read: not at all, once, or more.
    touched: Box<[AtomicU8]>,
}

impl Engine {
    /// An engine with an empty cache. `plan` was built from `checkpoint`.
    pub fn new(checkpoint: Arc<Checkpoint>, plan: Arc<Plan>, options: EngineOptions) -> Engine {
        let touched = plan.matrices.iter().map(|_| AtomicU8::new(0)).collect();
        // One expert's gate and up of the largest models are 32 MiB; more than a few are not read at
        // a time.
        let slab_bytes = (options.cache_bytes / 4).min(MAX_SLAB_BYTES);
        Engine {
            checkpoint,
            plan,
            chunks: Cache::new(options.cache_bytes - slab_bytes),
            keep_given: options.keep_given,
            slabs: Cache::new(slab_bytes),
            counters: Counters::default(),
            touched,
        }
    }

    /// The plan that it serves.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The checkpoint that it reads.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Its counters now.
    pub fn counters(&self) -> CounterSnapshot {
        let bytes = self.chunks.bytes() + self.slabs.bytes();
        self.counters.snapshot(bytes, self.chunks.budget() + self.slabs.budget())
    }

    /// Reads bytes `at..at + out.len()` of a tensor of the view.
    ///
    /// # Errors
    /// A read that leaves the tensor, and what the source fails with. What `out` holds then is not
    /// defined.
    pub fn read(&self, id: TensorId, at: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let tensor = self.plan.tensor(id);
        let bytes = u64::try_from(out.len()).expect("a usize fits in 64 bits");
        let size = tensor.bytes();
        add(&self.counters.reads, 1);
        let done = if at.checked_add(bytes).is_none_or(|end| end > size) {
            Err(ReadError::OutOfRange { tensor: tensor.name.clone(), at, bytes, size })
        } else {
            match &tensor.body {
                Body::Verbatim(runs) => self.verbatim(tensor, runs, at, out),
                Body::Computed(computed) => {
                    self.chunks(id, &computed.grid, at, out, |chunk, buffer| {
                        self.decode(tensor, computed, chunk, buffer)
                    })
                }
                Body::Encoded(encoded) => {
                    self.chunks(id, &encoded.grid, at, out, |chunk, buffer| {
                        self.encode(tensor, encoded, chunk, buffer)
                    })
                }
                Body::Literal(bytes) => {
                    let start = usize::try_from(at).expect("within the tensor");
                    out.copy_from_slice(&bytes[start..start + out.len()]);
                    Ok(())
                }
            }
        };
        match &done {
            Ok(()) => add(&self.counters.served_bytes, bytes),
            Err(_) => add(&self.counters.errors, 1),
        }
        done
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

    fn chunks(
        &self,
        id: TensorId,
        grid: &Grid,
        at: u64,
        out: &mut [u8],
        make: impl Fn(u64, &mut [u8]) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        let (mut at, mut left) = (at, out);
        while !left.is_empty() {
            let chunk = grid.chunk_at(at);
            let (start, bytes) = grid.extent(chunk);
            let length = usize::try_from(bytes).expect("a chunk fits in memory");
            let key = (id, chunk);
            let (decoded, outcome) =
                self.chunks.get(key, length, ReadError::Abandoned, |buffer| make(chunk, buffer))?;
            match outcome {
                Outcome::Hit => add(&self.counters.chunk_hits, 1),
                Outcome::Waited => add(&self.counters.chunk_waits, 1),
                Outcome::Made => {
                    add(&self.counters.chunk_misses, 1);
                    add(&self.counters.decoded_bytes, bytes);
                }
            }
            let into = usize::try_from(at - start).expect("within a chunk");
            let here = (length - into).min(left.len());
            let (now, later) = left.split_at_mut(here);
            now.copy_from_slice(&decoded[into..into + here]);
            drop(decoded);
            let here = u64::try_from(here).expect("a usize fits in 64 bits");
            if !self.keep_given {
                self.chunks.given(&key, here);
            }
            at += here;
            left = later;
        }
        Ok(())
    }

    fn decode(
        &self,
        tensor: &TensorPlan,
        computed: &Computed,
        chunk: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let chunk = computed.grid.chunk_box(chunk);
        self.touch_all(tensor, computed.fragments_of(chunk.plane))?;
        self.reader(&|id| self.first_read(id))
            .fill(computed, |id| self.plan.matrix(id), &tensor.shape, tensor.dtype, chunk, out)
            .map_err(|e| failed(tensor, e))
    }

    fn encode(
        &self,
        tensor: &TensorPlan,
        encoded: &Encoded,
        chunk: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let chunk = encoded.grid.chunk_box(chunk);
        let quantized = self.plan.quantized(encoded.quantized);
        for member in &quantized.members {
            self.touch_all(tensor, &member.values.fragments)?;
        }
        let first_read = |id| self.first_read(id);
        let encoder = Encoder {
            reader: self.reader(&first_read),
            original: self.plan.original.as_deref(),
            matrix_of: |id| self.plan.matrix(id),
            quantized,
        };
        encoder.fill(encoded, chunk, out).map_err(|e| failed(tensor, e))
    }

    fn reader<'a>(&'a self, first_read: &'a dyn Fn(MatrixId) -> bool) -> ChunkReader<'a> {
        ChunkReader {
            checkpoint: &self.checkpoint,
            counters: &self.counters,
            slabs: &self.slabs,
            first_read,
        }
    }

    fn first_read(&self, id: MatrixId) -> bool {
        self.touched[id.index()].load(Ordering::Acquire) < 2
    }

    fn touch_all(&self, tensor: &TensorPlan, fragments: &[Fragment]) -> Result<(), ReadError> {
        for fragment in fragments {
            let touched = &self.touched[fragment.matrix.index()];
            match touched.load(Ordering::Acquire) {
                0 => {
                    self.touch(tensor, fragment.matrix, transposes(&fragment.map))?;
                    touched.store(1, Ordering::Release);
                }
                1 => touched.store(2, Ordering::Release),
                _ => {}
            }
        }
        Ok(())
    }

    /// Before the first decoding of a matrix: checks the extents that its shape tensor states, and
    /// asks for its payload where that is one matrix and will be read in strips.
    fn touch(&self, tensor: &TensorPlan, id: MatrixId, strips: bool) -> Result<(), ReadError> {
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
