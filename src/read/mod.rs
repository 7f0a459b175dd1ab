//! Carries out a plan: bytes of the view's tensors, computed when they are asked for.
//!
//! ```text
//! Engine::read ── verbatim ── pread of the source
//!             └── computed ── cache (single flight) ── chunk: fragments decoded into place
//! ```
//! Any split of a read gives the same bytes. Nothing is decoded under a lock.

mod ahead;
mod audit;
mod buffer;
mod cache;
mod chunk;
mod core;
mod counters;
mod encode;
mod engine;
mod placement;
mod planes;
mod slabs;
mod streams;

use std::sync::Arc;

pub(crate) use audit::{BlockAudit, audit};
pub use buffer::Buffer;
pub use counters::CounterSnapshot;
pub use engine::{Engine, EngineOptions};

/// Why bytes of a tensor cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    /// The source gave an error; it is shared by all who waited for the same chunk.
    #[error("tensor `{tensor}`: {source}")]
    Source {
        /// The tensor of the view.
        tensor: Box<str>,
        /// What the source says.
        source: Arc<crate::source::SourceReadError>,
    },
    /// A tensor that states the extents of a matrix states others.
    #[error("tensor `{tensor}`: `{matrix}` is stored as {expected}, but its shape tensor says [{}, {}]", got[0], got[1])]
    StatedShape {
        /// The tensor of the view.
        tensor: Box<str>,
        /// The matrix of the checkpoint.
        matrix: Box<str>,
        /// Extents that the payload gives.
        expected: String,
        /// Extents that the shape tensor gives.
        got: [i64; 2],
    },
    /// A read that leaves its tensor.
    #[error("tensor `{tensor}`: cannot read {bytes} bytes at {at}, it has {size}")]
    OutOfRange {
        /// The tensor of the view.
        tensor: Box<str>,
        /// First byte asked for.
        at: u64,
        /// Bytes asked for.
        bytes: u64,
        /// Bytes of the tensor.
        size: u64,
    },
    /// Whoever decoded the chunk that this read waited for died of it.
    #[error("the decoder of a chunk that this read waited for panicked")]
    Abandoned,
}
