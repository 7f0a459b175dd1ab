//! A checkpoint as it lies on the disk: shards, config.json, the files beside them.
//!
//! [`resolve`] finds the directory that a user means, [`Checkpoint::open`] checks all of it that
//! can be checked without reading tensor data, and [`Checkpoint::read`] gives bytes of a tensor.
//! What the tensors mean (payloads, scales, layouts) is not known here.

mod access;
mod checkpoint;
mod config;
mod error;
mod files;
mod header;
mod hub;
mod index;
mod several;
mod shard;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod text;

pub use checkpoint::{Checkpoint, ShardId, SourceId, SourceTensor};
pub use config::{Config, ConfigError};
pub use error::{Misplaced, ReadError, ShardError, ShardFailure, SourceError, StoredTwice};
pub use files::HostFile;
pub use header::{HeaderError, LENGTH_BYTES, MAX_HEADER_BYTES};
pub use hub::resolve;
pub use index::INDEX;
pub use several::Several;
pub use shard::Shard;
pub use text::printable;
