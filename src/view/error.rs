//! The errors of a view.

use safetensors::SafeTensorError;
use std::io;
use std::path::PathBuf;

use crate::read::ReadError;

/// Why a view cannot be built, or an operation on it failed.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The view has no such inode number or name.
    #[error("no such file or directory")]
    NotFound,
    /// A directory operation on a file.
    #[error("not a directory")]
    NotADirectory,
    /// A file operation on a directory.
    #[error("is a directory")]
    IsADirectory,
    /// The engine failed.
    #[error("cannot read `{file}` at byte {at}")]
    Read {
        /// Path in the view.
        file: String,
        /// Offset of the read in the file, in bytes.
        at: u64,
        /// The cause.
        source: ReadError,
    },
    /// A file of the source could not be read.
    #[error("cannot read `{}`", path.display())]
    Host {
        /// Path of the source's file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file of the source was replaced or truncated after the view was built.
    #[error("`{}` changed under the view: expected {expected} bytes, got {got} bytes, or a newer file", path.display())]
    HostChanged {
        /// Path of the source's file.
        path: PathBuf,
        /// Size when the view was built, in bytes.
        expected: u64,
        /// Size now, in bytes.
        got: u64,
    },
    /// The name is reserved, already in use, or would be outside the view.
    #[error("a directory of the view cannot be called `{name}`")]
    DirectoryName {
        /// The name in the plan.
        name: String,
    },
    /// The tensors of a directory exceed 2^64 bytes.
    #[error("the tensors of directory `{directory}` exceed 2^64 bytes")]
    TooLarge {
        /// The name of the directory in the plan.
        directory: String,
    },
    /// No valid safetensors header describes these tensors.
    #[error("no safetensors header for `{file}`: {source}")]
    Header {
        /// The path of the file in the view.
        file: String,
        /// What is wrong.
        source: SafeTensorError,
    },
}
