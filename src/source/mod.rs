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

pub(crate) use checkpoint::SourceId;
pub(crate) use error::SourceReadError;
pub(crate) use header::MAX_HEADER_BYTES;
pub(crate) use index::INDEX;
pub(crate) use shard::Shard;
pub(crate) use text::printable;

pub use checkpoint::{Checkpoint, SourceTensor};
pub use config::{Config, ConfigError};
pub use error::SourceError;
pub use hub::resolve;
