//! What can go wrong in the view.

use std::io;
use std::path::PathBuf;

use crate::read::ReadError;

/// Why a view cannot be built, or what was asked of it not be done.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// A number or name that the view does not hold.
    #[error("no such file or directory")]
    NotFound,
    /// A name was looked up in a file.
    #[error("not a directory")]
    NotADirectory,
    /// Bytes of a directory were asked for.
    #[error("is a directory")]
    IsADirectory,
    /// The engine could not make the bytes.
    #[error("cannot read `{file}` at byte {at}")]
    Read {
        /// Path in the view.
        file: String,
        /// Offset of the read in the file, in bytes.
        at: u64,
        /// What failed.
        source: ReadError,
    },
    /// A file of the source could not be read.
    #[error("cannot read `{}`", path.display())]
    Host {
        /// Path of the source's file.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// A file of the source was replaced under the view.
    #[error("`{}` changed under the view: expected {expected} bytes, got {got} bytes, or a newer file", path.display())]
    HostChanged {
        /// Path of the source's file.
        path: PathBuf,
        /// Size when the view was built, in bytes.
        expected: u64,
        /// Size now, in bytes.
        got: u64,
    },
    /// Files could not be told apart, or would lie outside the view.
    #[error("a directory of the view cannot be called `{name}`")]
    DirectoryName {
        /// The plan's name.
        name: String,
    },
    /// The tensors of a directory exceed 2^64 bytes.
    #[error("the tensors of directory `{directory}` exceed 2^64 bytes")]
    TooLarge {
        /// The plan's name of the directory.
        directory: String,
    },
}
