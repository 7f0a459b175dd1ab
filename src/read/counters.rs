//! Counters of an engine: which path served how many bytes.

use std::sync::atomic::{AtomicU64, Ordering};

/// The live counters; [`CounterSnapshot`] says what they count.
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

/// Adds to a counter. Relaxed: no other memory depends on counters.
pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// The values of an engine's counters at one moment, since the engine was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CounterSnapshot {
    /// Reads of tensors, failed ones included.
    pub reads: u64,
    /// Bytes served to readers.
    pub served_bytes: u64,
    /// Of these, bytes that were copied or spliced unchanged from the source.
    pub verbatim_bytes: u64,
    /// Chunk requests of readers that found the chunk in the cache.
    pub chunk_hits: u64,
    /// Chunk requests of readers that waited for another thread to decode the chunk.
    pub chunk_waits: u64,
    /// Chunk requests of readers that decoded the chunk. Reads that are decoded in place request no
    /// chunk.
    pub chunk_misses: u64,
    /// Bytes that were decoded or encoded: chunks, by readers and by prefetch threads, and rows in
    /// place.
    pub decoded_bytes: u64,
    /// Bytes that were requested from the source: payloads, scales and verbatim runs, for readers
    /// and ahead of them. Not counted: shape tensors, and scales that the encoder takes from an
    /// original checkpoint.
    pub source_bytes: u64,
    /// Reads of tensors that failed.
    pub errors: u64,
    /// Bytes in the cache of decoded chunks and in the cache of source rows, entries in flight
    /// included.
    pub cache_bytes: u64,
    /// Budget of both caches together, in bytes.
    pub cache_budget: u64,
}

impl Counters {
    /// Counts bytes that were served unchanged from the source.
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
