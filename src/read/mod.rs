#![doc = include_str!("README.md")]

mod audit;
mod box_copy;
mod buffer;
mod cache;
mod counters;
mod decode;
mod encode;
mod engine;
mod history;
mod plane_rows;
mod prefetch;
mod shared;
mod source_rows;

use std::sync::Arc;

pub(crate) use audit::{BlockAudit, audit};
pub use buffer::Buffer;
pub use counters::CounterSnapshot;
pub use engine::{Engine, EngineOptions};

/// Why a read of a tensor failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    /// The source failed. All reads that waited for the same chunk share the error.
    #[error("tensor `{tensor}`: {source}")]
    Source {
        /// The tensor of the view.
        tensor: Box<str>,
        /// The error of the source.
        source: Arc<crate::source::SourceReadError>,
    },
    /// The shape tensor of a packed matrix contradicts the size of its payload.
    #[error("tensor `{tensor}`: `{matrix}` is stored as {expected}, but its shape tensor says [{}, {}]", got[0], got[1])]
    StatedShape {
        /// The tensor of the view.
        tensor: Box<str>,
        /// The matrix of the checkpoint.
        matrix: Box<str>,
        /// The shape according to the payload.
        expected: String,
        /// The extents that the shape tensor contains.
        got: [i64; 2],
    },
    /// The range of the read is not within the tensor.
    #[error("tensor `{tensor}`: cannot read {bytes} bytes at {at}, it has {size}")]
    OutOfRange {
        /// The tensor of the view.
        tensor: Box<str>,
        /// First byte of the read.
        at: u64,
        /// Bytes of the read.
        bytes: u64,
        /// Bytes of the tensor.
        size: u64,
    },
    /// The thread that decoded a chunk for this read panicked, a bug.
    #[error("the decoder of a chunk that this read waited for panicked")]
    Abandoned,
}
