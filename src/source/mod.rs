#![doc = include_str!("README.md")]

mod access;
mod checkpoint;
mod config;
mod error;
mod files;
mod first_few;
mod header;
mod hub;
mod index;
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
