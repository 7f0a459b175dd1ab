//! Gather: from the stored tensors of a checkpoint to matrices, and from matrices to whole tensors.

mod matrices;
mod orphans;
mod unsupported;
mod whole_tensors;

pub(super) use matrices::gather_matrices;
pub(super) use unsupported::check_config;
pub(super) use whole_tensors::{WholeTensor, check_extents, whole_tensors};
