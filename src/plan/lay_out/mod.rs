//! Gives tensors their dtypes, bodies and directories.

mod bodies;
mod config_entries;
mod directories;
mod quantize;
mod ranks;

pub(super) use config_entries::stated;
pub(super) use directories::{Layers, natural_key, refuse_uncastable};
pub(super) use quantize::{Facets, Original, as_stored, by_mapping, by_original};
pub use ranks::{ExpertParallel, ExpertShard};
