//! Element types, shapes and the affine maps between boxes of two tensors.
//!
//! Pure arithmetic: nothing here reads a file, decodes a byte or knows a name.

mod boxmap;
mod dtype;
mod shape;
mod size;

pub(crate) use boxmap::{Axis, BoxMap, coalesce};
pub use dtype::{DType, Float};
pub use shape::Shape;
pub(crate) use size::{ByteSize, to_u64, to_usize};
