//! The engine: serves the bytes of a plan's tensors, and decides how.
//!
//! For each read of a tensor that is not verbatim it decides whether to decode in place or to copy
//! from a cached chunk, how wide source rows are read, what to prefetch and what to release. The
//! decisions use the reader's run: the bytes that it read in sequence before this read.

use crate::tensor::{to_u64, to_usize};
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use super::ReadError;
use super::counters::{CounterSnapshot, add};
use super::decode::LEADING_PANEL_BYTES;
use super::history::Claim;
use super::prefetch::PrefetchPool;
use super::shared::{ChunkedBody, PlaneRead, PrefetchJob, Shared};
use super::source_rows::SourceWidth;
use crate::plan::{Body, Plan, TensorId, TensorPlan};
use crate::source::Checkpoint;

/// Reads of at least this many bytes are decoded in place. Copying out of a chunk costs 35 ms/GB if
/// the chunk is in the core's cache and 85 if it is not; decoding a narrower strip of rows costs
/// more than either.
const MIN_IN_PLACE_BYTES: u64 = 512 << 10;

/// A read of at most this many bytes that continues no earlier read is decoded alone, without the
/// rest of its chunk: it may be a random access.
const MAX_RANDOM_READ_BYTES: u64 = 64 << 10;

/// Bytes that are decoded in place in one step: they stay in a core's L2 cache until the kernel
/// copies them.
const IN_PLACE_STEP_BYTES: u64 = 1 << 20;

/// With direct I/O and a single reader: how many chunks to decode in advance, so that other cores
/// help. 0, 1, 2, 4 and 8 chunks give 2.6, 2.5, 2.6, 2.7 and 2.9 GB/s of FP8, and 2.2, 2.9, 2.9,
/// 2.9 and 2.5 of INT4.
const PREFETCH_CHUNKS: u64 = 4;

/// Prefetch the source rows of one plane (expert) per this many planes already read in sequence.
/// Prefetching sooner wastes I/O for expert-parallel ranks, which stop after a few experts: a rank
/// that reads five experts of a tensor would fetch 1.2 times its share; now it fetches 1.09. A
/// source in the page cache is as fast without (after 1 and 10 planes: 2.2 and 2.3 GB/s).
const SEQUENTIAL_PLANES_PER_PREFETCH: u64 = 10;

/// Most planes whose source rows are prefetched ahead of a reader. From a cold disk with direct
/// I/O, FP4 reaches 3.4 GB/s with one and 4.1 with two; FP8 and INT4 are alike.
const MAX_PREFETCH_PLANES: u64 = 2;

/// Bytes that a reader must have read in sequence as well before source rows are prefetched: kernel
/// read-ahead alone can cover many small planes.
const MIN_RUN_FOR_ROWS_BYTES: u64 = 128 << 20;

/// A sequential run shorter than this may be mmap fault-around, not a sequential reader: do not
/// read more source columns than requested. The kernel reads 2 MiB around the first page of a
/// mapping that is touched.
const FAULT_AROUND_BYTES: u64 = 2 << 20;

/// After this many reads in a row without a concurrent one, a reader counts as the only one.
const READS_UNTIL_SINGLE: u32 = 32;

/// Source rows are kept until the furthest read is this many bytes beyond them, since the threads
/// of a reader drift apart. Two threads with direct I/O from a cold disk: 2.7 GB/s with 32 and 64
/// MiB, 3.0 with 128.
const RELEASE_LAG_BYTES: u64 = 128 << 20;

/// Most planes whose source rows are released at a time. If there are more, their rows were evicted
/// already.
const MAX_RELEASE_PLANES: u64 = 64;

/// The resources of an engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Byte budget of the caches: decoded chunks and source rows, those in flight included.
    pub cache_bytes: u64,
    /// Whether readers bypass the kernel's page cache. The kernel then neither caches nor
    /// prefetches, so the engine keeps chunks after they were read and prefetches by itself.
    pub direct_io: bool,
    /// Prefetch threads; they start with the first prefetch. With 0, nothing is prefetched.
    pub threads: usize,
}

impl Default for EngineOptions {
    /// Caches of 1 GiB, reads through the page cache, a prefetch thread for each core.
    fn default() -> EngineOptions {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        EngineOptions { cache_bytes: 1 << 30, direct_io: false, threads }
    }
}

/// Serves the bytes of a plan's tensors. All methods can be called from any thread.
pub struct Engine {
    shared: Arc<Shared>,
    /// Reads of computed and encoded tensors that are running.
    active: AtomicUsize,
    /// Reads without a concurrent one that are missing until a reader counts as the only one.
    reads_until_single: AtomicU32,
    prefetch: PrefetchPool<PrefetchJob>,
}

/// Counts a running read; dropping it, also in a panic, ends the read.
struct ActiveRead<'a>(&'a AtomicUsize);

impl Drop for ActiveRead<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Engine {
    /// An engine with empty caches. `plan` must have been built from `checkpoint`.
    pub fn new(checkpoint: Arc<Checkpoint>, plan: Arc<Plan>, options: EngineOptions) -> Engine {
        let shared = Arc::new(Shared::new(checkpoint, plan, options));
        let worker = Arc::clone(&shared);
        let prefetch = PrefetchPool::new(options.threads, move |job| worker.run(&job));
        let (active, reads_until_single) = (AtomicUsize::new(0), AtomicU32::new(0));
        Engine { shared, active, reads_until_single, prefetch }
    }

    /// The plan that it serves.
    pub fn plan(&self) -> &Plan {
        &self.shared.plan
    }

    /// The checkpoint that it reads.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.shared.checkpoint
    }

    /// The current values of its counters.
    pub fn counters(&self) -> CounterSnapshot {
        let Shared { chunks, source_rows, counters, .. } = &*self.shared;
        let bytes = chunks.bytes() + source_rows.bytes();
        counters.snapshot(bytes, chunks.budget() + source_rows.budget())
    }

    /// Reads bytes `at..at + out.len()` of a tensor of the view. Any split of a read gives the same
    /// bytes.
    ///
    /// # Errors
    /// If the range is not within the tensor, or the source fails. The contents of `out` are then
    /// undefined.
    pub fn read(&self, id: TensorId, at: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let shared = &*self.shared;
        let tensor = shared.plan.tensor(id);
        let bytes = to_u64(out.len());
        let size = tensor.bytes();
        add(&shared.counters.reads, 1);
        let done = if at.checked_add(bytes).is_none_or(|end| end > size) {
            Err(ReadError::OutOfRange { tensor: tensor.name.clone(), at, bytes, size })
        } else {
            match &tensor.body {
                Body::Verbatim(runs) => shared.read_verbatim(tensor, runs, at, out),
                Body::Computed(computed) => {
                    self.read_chunked(id, tensor, ChunkedBody::Computed(computed), at, out)
                }
                Body::Encoded(encoded) => {
                    self.read_chunked(id, tensor, ChunkedBody::Encoded(encoded), at, out)
                }
                Body::Literal(bytes) => {
                    let start = to_usize(at);
                    out.copy_from_slice(&bytes[start..start + out.len()]);
                    Ok(())
                }
            }
        };
        match &done {
            Ok(()) => add(&shared.counters.served_bytes, bytes),
            Err(_) => add(&shared.counters.errors, 1),
        }
        done
    }

    /// The source file and the offset in it where bytes `at..at + bytes` of a tensor are stored
    /// unchanged, so that the caller can splice them. `None` if they are computed, or are not
    /// contiguous in one file.
    pub(crate) fn verbatim_location(
        &self,
        id: TensorId,
        at: u64,
        bytes: u64,
    ) -> Option<(&File, u64)> {
        match &self.shared.plan.tensor(id).body {
            Body::Verbatim(runs) => self.shared.verbatim_location(runs, at, bytes),
            Body::Computed(_) | Body::Encoded(_) | Body::Literal(_) => None,
        }
    }

    /// Counts a read of `bytes` bytes that the caller spliced from [`Engine::verbatim_location`].
    pub(crate) fn count_spliced(&self, bytes: u64) {
        let counters = &self.shared.counters;
        add(&counters.reads, 1);
        add(&counters.served_bytes, bytes);
        counters.add_verbatim(bytes);
    }

    /// Registers a running read; also returns whether only one reader has been active lately.
    fn begin_read(&self) -> (ActiveRead<'_>, bool) {
        let concurrent = self.active.fetch_add(1, Ordering::Relaxed);
        let missing = self.reads_until_single.load(Ordering::Relaxed);
        let missing = if concurrent > 0 { READS_UNTIL_SINGLE } else { missing.saturating_sub(1) };
        self.reads_until_single.store(missing, Ordering::Relaxed);
        (ActiveRead(&self.active), missing == 0)
    }

    /// Reads from a computed or encoded tensor.
    fn read_chunked(
        &self,
        id: TensorId,
        tensor: &TensorPlan,
        body: ChunkedBody<'_>,
        at: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        if out.is_empty() {
            return Ok(());
        }
        let (_active, single_reader) = self.begin_read();
        let (shared, grid) = (&*self.shared, body.grid());
        let end = at + to_u64(out.len());
        let run = shared.history.observe(id, tensor.bytes(), at, end);
        let plane_bytes = grid.rows * grid.row_bytes;

        // Release the source rows of planes that the reader has left behind.
        if let ChunkedBody::Computed(computed) = body {
            let until = (end / plane_bytes).saturating_sub(RELEASE_LAG_BYTES.div_ceil(plane_bytes));
            let claim = Claim::PlanesBehind;
            for plane in shared.history.claim(id, claim, until, MAX_RELEASE_PLANES) {
                shared.release_source_rows(tensor, computed, plane);
            }
        }

        // Prefetch the source rows of the next planes for a long run.
        let planes_read = SEQUENTIAL_PLANES_PER_PREFETCH * plane_bytes;
        let long_run = planes_read.max(MIN_RUN_FOR_ROWS_BYTES);
        if run >= long_run {
            let ahead = (run / planes_read).clamp(1, MAX_PREFETCH_PLANES);
            let until = (end / plane_bytes + 1 + ahead).min(grid.planes);
            let planes = shared.history.claim(id, Claim::PlanesAhead, until, ahead);
            self.prefetch.push(planes.map(|plane| PrefetchJob::SourceRows(id, plane)));
        }

        let (mut now, mut left) = (at, out);
        let (mut in_place, mut source_width) = (false, SourceWidth::Strip);
        while !left.is_empty() {
            let within = now % plane_bytes;
            let here = (plane_bytes - within).min(to_u64(left.len()));
            let run = run + (now - at);
            source_width = if run >= long_run {
                SourceWidth::WholeRows
            } else if run >= FAULT_AROUND_BYTES
                && plane_bytes - within >= LEADING_PANEL_BYTES.min(plane_bytes / 2)
            {
                SourceWidth::Panel
            } else {
                SourceWidth::Strip
            };
            let read = PlaneRead { plane: now / plane_bytes, at: within, source_width };
            let size = here.min(IN_PLACE_STEP_BYTES);
            let (out, _) = left.split_at_mut(to_usize(size));
            // Not in small planes: requests begin and end anywhere in them, so that much of them
            // would be decoded twice.
            let large = end - at >= MIN_IN_PLACE_BYTES
                && size >= 2 * grid.row_bytes
                && plane_bytes > LEADING_PANEL_BYTES;
            let random = run == 0 && size <= MAX_RANDOM_READ_BYTES;
            in_place |= large;
            let here = match body {
                ChunkedBody::Computed(computed)
                    if (large || random) && !shared.chunks.contains(&(id, grid.chunk_at(now))) =>
                {
                    shared.decode_in_place(tensor, computed, read, out)?
                }
                ChunkedBody::Computed(_) | ChunkedBody::Encoded(_) => {
                    shared.copy_from_chunk(id, tensor, body, read, left, large)?
                }
            };
            now += to_u64(here);
            left = &mut left[here..];
        }

        // Decode the next chunks in advance. A reader that decodes in place needs this only if it
        // is alone and the kernel does not read ahead for it: then the other cores would be idle.
        let idle_cores = shared.direct_io && single_reader;
        let room = shared.chunks.budget() >= 4 * PREFETCH_CHUNKS * grid.chunk_rows * grid.row_bytes;
        if run > 0 && room && (!in_place || idle_cores) {
            let chunk = grid.chunk_at(end - 1);
            // Through the page cache the kernel reads ahead too, so one chunk is enough.
            let ahead = if shared.direct_io { PREFETCH_CHUNKS } else { 1 };
            let until = (chunk + 1 + ahead).min(grid.chunks());
            let chunks = shared.history.claim(id, Claim::Chunks, until, ahead);
            let job = |chunk| PrefetchJob::Chunk(id, chunk, source_width);
            self.prefetch.push(chunks.map(job));
        }
        Ok(())
    }
}
