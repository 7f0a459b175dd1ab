//! Lay out: quantizes where that is asked for, gives each tensor its dtype and body, and puts the
//! tensors into directories.

mod bodies;
mod config_entries;
mod directories;
mod quantize;
mod ranks;

pub(super) use config_entries::config_entries;
pub(super) use directories::{DirectoryBuilder, natural_key, refuse_uncastable};
pub(super) use quantize::{
    Facets, Original, copy_quantized, quantize_by_mapping, quantize_like_original,
};
pub use ranks::{ExpertParallel, ExpertShard};
