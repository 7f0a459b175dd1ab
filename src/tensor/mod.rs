#![doc = include_str!("README.md")]

mod boxmap;
mod dtype;
mod shape;
mod size;

pub(crate) use boxmap::{Axis, BoxMap, coalesce};
pub use dtype::{DType, Float};
pub use shape::Shape;
pub(crate) use size::{ByteSize, to_u64, to_usize};
