//! Writes small checkpoints for tests.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use super::checkpoint::Checkpoint;
use super::index::INDEX;
use crate::tensor::{DType, Shape};

/// A tensor to write: name, dtype, shape, bytes.
pub(crate) type Tensor<'a> = (&'a str, DType, &'a [u64], Vec<u8>);

/// The bytes of a safetensors file with these tensors, in this order.
pub(crate) fn safetensors(tensors: &[Tensor<'_>]) -> Vec<u8> {
    let mut header = json!({ "__metadata__": { "format": "pt" } });
    let mut data = Vec::new();
    for (name, dtype, dims, bytes) in tensors {
        assert_eq!(Shape::new(*dims).bytes(*dtype), Some(bytes.len() as u64), "{name}");
        let start = data.len();
        data.extend(bytes);
        header[*name] =
            json!({ "dtype": dtype.name(), "shape": dims, "data_offsets": [start, data.len()] });
    }
    raw(header.to_string(), &data)
}

/// The bytes of a safetensors file with this header and data, which need not be valid.
pub(crate) fn raw(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    let length = u64::try_from(header.len()).expect("a test header");
    [&length.to_le_bytes()[..], header, data].concat()
}

/// Builds a checkpoint in a temporary directory.
pub(crate) struct Dir(TempDir);

impl Dir {
    /// An empty directory with config.json `{}`.
    pub(crate) fn new() -> Dir {
        Dir(tempfile::tempdir().expect("a directory for the test")).file("config.json", "{}")
    }

    /// Writes a file, and creates its parent directories.
    pub(crate) fn file(self, name: &str, bytes: impl AsRef<[u8]>) -> Dir {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().expect("below the directory")).expect("writable");
        fs::write(path, bytes).expect("writable");
        self
    }

    /// Writes a shard.
    pub(crate) fn shard(self, name: &str, tensors: &[Tensor<'_>]) -> Dir {
        self.file(name, safetensors(tensors))
    }

    /// Writes an index of pairs `(tensor, file)`.
    pub(crate) fn index(self, weights: &[(&str, &str)]) -> Dir {
        let map: BTreeMap<_, _> = weights.iter().copied().collect();
        self.file(INDEX, json!({ "metadata": { "total_size": 0 }, "weight_map": map }).to_string())
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// A path below the directory.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Opens the directory as a checkpoint; panics with the message if it is refused.
    pub(crate) fn open(&self) -> Checkpoint {
        Checkpoint::open(self.path()).unwrap_or_else(|e| panic!("{e}"))
    }

    /// The message with which the directory is refused, with `DIR` for its path; panics if it is
    /// accepted.
    pub(crate) fn refusal(&self) -> String {
        match Checkpoint::open(self.path()) {
            Ok(_) => panic!("the checkpoint was accepted"),
            Err(e) => e.to_string().replace(&*self.path().to_string_lossy(), "DIR"),
        }
    }
}
