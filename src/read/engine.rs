//! The engine: a plan, the checkpoint that it reads, and a cache of decoded chunks.
//!
//! A read of many rows of a large plane is decoded in place, all others are served from chunks. What a
//! reader that goes forward will want next is begun before it asks.

use crate::tensor::{to_u64, to_usize};
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use super::ReadError;
use super::ahead::Ahead;
use super::chunk::LEADING;
use super::core::{Core, Job, Made, Part};
use super::counters::{CounterSnapshot, add};
use super::slabs::Keep;
use super::streams::Unit;
use crate::plan::{Body, Plan, TensorId, TensorPlan};
use crate::source::Checkpoint;

/// Bytes from which on a read is decoded in place: the copy out of a chunk costs 35 ms/GB where the chunk
/// is in the core's cache and 85 where it is not, a narrower strip of rows more than either.
const IN_PLACE: u64 = 512 << 10;

/// Bytes up to which a read that nothing leads to is decoded alone, without the rest of its chunk.
const ALONE: u64 = 64 << 10;

/// Bytes that are decoded in place at a time: they stay in a core's L2 cache until the kernel
/// copies them.
const AT_A_TIME: u64 = 1 << 20;

/// Chunks that are made ahead of a single reader past the page cache, for which else one core works:
/// none, 1, 2, 4 and 8 give 2.6, 2.5, 2.6, 2.7 and 2.9 GB/s of FP8, and 2.2, 2.9, 2.9, 2.9 and 2.5 of
/// INT4.
const CHUNKS_AHEAD: u64 = 4;

/// Planes that a reader went through without a gap for each whose stored rows are read whole ahead of
/// it: else a rank that wants five experts of a tensor would ask for 1.2 times its share, and asks for
/// 1.09. What is in the page cache is read as fast without (1 and 10 planes: 2.2 and 2.3 GB/s).
const PLANES_BEFORE_ROWS_AHEAD: u64 = 10;

/// Planes whose stored rows are read ahead at most. From a cold disk, past the page cache: FP4 at 3.4
/// GB/s with one, 4.1 with two; FP8 and INT4 alike.
const PLANES_AHEAD: u64 = 2;

/// Bytes that it went through as well: what the kernel reads ahead is many small planes.
const BYTES_BEFORE_ROWS_AHEAD: u64 = 128 << 20;

/// Bytes that a reader went through before it is expected to want more columns than it asks for: the
/// kernel reads 2 MiB around the first page of a map that is touched.
const GOES_ON: u64 = 2 << 20;

/// Reads in a row without another under way that make a reader the only one.
const CROWD: u32 = 32;

/// Bytes behind the furthest that a reader read where it may still read: threads of a reader drift
/// apart. Two that read past the page cache from a cold disk: 2.7 GB/s with 32 and 64 MiB, 3.0 with 128.
const BYTES_BEHIND: u64 = 128 << 20;

/// Planes that are let go of at a time; those that are more were evicted.
const PLANES_AT_ONCE: u64 = 64;

/// What an engine may use.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Byte budget of the cache of decoded chunks, those being decoded included.
    pub cache_bytes: u64,
    /// Whether readers bypass the kernel's page cache (`--direct-io`). The kernel then neither caches
    /// nor prefetches, so the engine keeps chunks after they were read and prefetches by itself.
    pub direct_io: bool,
    /// Prefetch threads; they start when there is something to do. With 0, nothing is prefetched.
    pub threads: usize,
}

impl Default for EngineOptions {
    /// A cache of 1 GiB, reads through the page cache, a prefetch thread for each core.
    fn default() -> EngineOptions {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        EngineOptions { cache_bytes: 1 << 30, direct_io: false, threads }
    }
}

/// Serves the bytes of a plan's tensors.
pub struct Engine {
    core: Arc<Core>,
    /// Reads of made tensors that are under way.
    active: AtomicUsize,
    /// How many reads without another under way are left until a reader counts as the only one.
    crowd: AtomicU32,
    ahead: Ahead<Job>,
}

/// A read of a made tensor that is under way; it ends when this is dropped, also by a panic.
struct UnderWay<'a>(&'a AtomicUsize);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Engine {
    /// An engine with an empty cache. `plan` was built from `checkpoint`.
    pub fn new(checkpoint: Arc<Checkpoint>, plan: Arc<Plan>, options: EngineOptions) -> Engine {
        let core = Arc::new(Core::new(checkpoint, plan, options));
        let working = Arc::clone(&core);
        let ahead = Ahead::new(options.threads, move |job| working.work(&job));
        Engine { core, active: AtomicUsize::new(0), crowd: AtomicU32::new(0), ahead }
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
        let bytes = to_u64(out.len());
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
                    let start = to_usize(at);
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

    /// Where bytes `at..at + bytes` of a tensor of the view lie in a file of the source as they are:
    /// the file, and the offset in it. `None` where they are made, or lie in several places.
    pub(crate) fn stored(&self, id: TensorId, at: u64, bytes: u64) -> Option<(&File, u64)> {
        match &self.core.plan.tensor(id).body {
            Body::Verbatim(runs) => self.core.stored(runs, at, bytes),
            Body::Computed(_) | Body::Encoded(_) | Body::Literal(_) => None,
        }
    }

    /// Counts a read of `bytes` bytes that somebody took from where [`Engine::stored`] said.
    pub(crate) fn count_stored(&self, bytes: u64) {
        let counters = &self.core.counters;
        add(&counters.reads, 1);
        add(&counters.served_bytes, bytes);
        counters.add_verbatim(bytes);
    }

    /// Begins a read of a made tensor, and tells whether one reader alone reads such tensors.
    fn begin(&self) -> (UnderWay<'_>, bool) {
        let others = self.active.fetch_add(1, Ordering::Relaxed);
        let crowd = self.crowd.load(Ordering::Relaxed);
        let crowd = if others > 0 { CROWD } else { crowd.saturating_sub(1) };
        self.crowd.store(crowd, Ordering::Relaxed);
        (UnderWay(&self.active), crowd == 0)
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
        let (_under_way, alone) = self.begin();
        let (core, grid) = (&*self.core, made.grid());
        let end = at + to_u64(out.len());
        let run = core.streams.advance(id, tensor.bytes(), at, end);
        let plane_bytes = grid.rows * grid.row_bytes;
        if let Made::Computed(computed) = made {
            let behind = (end / plane_bytes).saturating_sub(BYTES_BEHIND.div_ceil(plane_bytes));
            for plane in core.streams.ask(id, Unit::Behind, behind, PLANES_AT_ONCE) {
                core.forget_rows(tensor, computed, plane);
            }
        }
        let sure = (PLANES_BEFORE_ROWS_AHEAD * plane_bytes).max(BYTES_BEFORE_ROWS_AHEAD);
        if run >= sure {
            let ahead = (run / (PLANES_BEFORE_ROWS_AHEAD * plane_bytes)).clamp(1, PLANES_AHEAD);
            let until = (end / plane_bytes + 1 + ahead).min(grid.planes);
            let planes = core.streams.ask(id, Unit::Plane, until, ahead);
            self.ahead.push(planes.map(|plane| Job::Rows(id, plane)));
        }
        let (mut now, mut left) = (at, out);
        let (mut in_place, mut keep) = (false, Keep::Nothing);
        while !left.is_empty() {
            let within = now % plane_bytes;
            let here = (plane_bytes - within).min(to_u64(left.len()));
            let run = run + (now - at);
            keep = if run >= sure {
                Keep::Rows
            } else if run >= GOES_ON && plane_bytes - within >= LEADING.min(plane_bytes / 2) {
                Keep::Part
            } else {
                Keep::Nothing
            };
            let part = Part { plane: now / plane_bytes, at: within, keep };
            let size = here.min(AT_A_TIME);
            let (out, _) = left.split_at_mut(to_usize(size));
            // Requests cut small planes anywhere, and so would decode much of them twice.
            let rows = end - at >= IN_PLACE && size >= 2 * grid.row_bytes && plane_bytes > LEADING;
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
        let single = core.direct_io && alone;
        let room = core.chunks.budget() >= 4 * CHUNKS_AHEAD * grid.chunk_rows * grid.row_bytes;
        if run > 0 && room && (!in_place || single) {
            let chunk = grid.chunk_at(end - 1);
            // The kernel reads ahead as well, unless it is told not to keep pages.
            let ahead = if core.direct_io { CHUNKS_AHEAD } else { 1 };
            let until = (chunk + 1 + ahead).min(grid.chunks());
            let chunks = core.streams.ask(id, Unit::Chunk, until, ahead);
            self.ahead.push(chunks.map(|chunk| Job::Chunk(id, chunk, keep)));
        }
        Ok(())
    }
}
