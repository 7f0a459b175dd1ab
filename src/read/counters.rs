//! Live counters of an engine.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters as the engine keeps them.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub reads: AtomicU64,
    pub served_bytes: AtomicU64,
    pub verbatim_bytes: AtomicU64,
    pub chunk_hits: AtomicU64,
    pub chunk_waits: AtomicU64,
    pub chunk_misses: AtomicU64,
    pub decoded_bytes: AtomicU64,
    pub source_bytes: AtomicU64,
    pub errors: AtomicU64,
}

/// Adds to a counter; counters order nothing else.
pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Counters of an engine at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CounterSnapshot {
    /// Reads of tensors.
    pub reads: u64,
    /// Bytes given to readers.
    pub served_bytes: u64,
    /// Of these, bytes that are the source's own.
    pub verbatim_bytes: u64,
    /// Reads of a chunk that found it in the cache.
    pub chunk_hits: u64,
    /// Reads of a chunk that waited for another reader's decoding.
    pub chunk_waits: u64,
    /// Reads of a chunk that decoded it.
    pub chunk_misses: u64,
    /// Bytes of chunks that were decoded.
    pub decoded_bytes: u64,
    /// Bytes that were asked of the source: payloads, scales and verbatim runs.
    pub source_bytes: u64,
    /// Reads that failed.
    pub errors: u64,
    /// Bytes in the chunk cache, those being decoded included.
    pub cache_bytes: u64,
    /// Budget of the chunk cache in bytes.
    pub cache_budget: u64,
}

impl Counters {
    /// Counts bytes that were given as the source has them.
    pub(super) fn add_verbatim(&self, bytes: u64) {
        add(&self.verbatim_bytes, bytes);
        add(&self.source_bytes, bytes);
    }

    pub(super) fn snapshot(&self, cache_bytes: u64, cache_budget: u64) -> CounterSnapshot {
        let load = |c: &AtomicU64| c.load(Ordering::Relaxed);
        CounterSnapshot {
            reads: load(&self.reads),
            served_bytes: load(&self.served_bytes),
            verbatim_bytes: load(&self.verbatim_bytes),
            chunk_hits: load(&self.chunk_hits),
            chunk_waits: load(&self.chunk_waits),
            chunk_misses: load(&self.chunk_misses),
            decoded_bytes: load(&self.decoded_bytes),
            source_bytes: load(&self.source_bytes),
            errors: load(&self.errors),
            cache_bytes,
            cache_budget,
        }
    }
}
