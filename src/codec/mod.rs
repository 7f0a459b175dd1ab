//! How stored bytes code matrix elements. Imports `tensor` only.

mod scheme;

pub use scheme::{ScaleGrid, Scheme};

/// How one element of a stored matrix is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Code {
    E4M3,
    E2M1,
    Int4,
    BF16,
    F16,
    F32,
}

/// How a scale is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum ScaleCode {
    F32,
    BF16,
    F16,
    E8M0,
}
