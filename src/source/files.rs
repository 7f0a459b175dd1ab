//! The files beside the shards, which a view passes through unchanged: tokenizer, code, readme.
//!
//! These files are left out:
//!
//! - config.json, the index and the shards, of which a view has its own;
//! - other safetensors files, because loaders take every `*.safetensors` for a shard;
//! - files that describe the quantization of the source's weights. Some loaders read them before
//!   config.json, and they are wrong for a view, which is quantized in another way or not at all;
//! - hidden files and directories.
//!
//! Weights in other formats are passed through. Symlinks to files are followed. Symlinks to
//! directories are not: they lead out of the checkpoint or in circles. For a save of NeMo
//! Automodel, the files in `.hf_metadata` are passed through instead of those beside the shards,
//! where there is a consolidated copy.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::error::SourceError;

/// Number of directory levels below the checkpoint directory that are searched.
const MAX_DEPTH: usize = 16;

/// Subdirectory in which NeMo Automodel saves config.json, the tokenizer and files for its own use
/// (`fqn_to_*.json`).
pub(super) const AUTOMODEL_METADATA_DIR: &str = ".hf_metadata";

/// File name of the model's configuration.
pub(super) const CONFIG: &str = "config.json";

/// A file that a view passes through unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostFile {
    /// Path relative to the checkpoint directory.
    pub name: PathBuf,
    /// Path of the file itself: absolute, symlinks resolved.
    pub path: PathBuf,
    /// Size in bytes when the checkpoint was opened.
    pub bytes: u64,
    /// Modification time when the checkpoint was opened.
    pub modified: SystemTime,
}

/// The host files below `dir`, the directory of config.json, sorted by name.
pub(super) fn host_files(dir: &Path) -> Result<Vec<HostFile>, SourceError> {
    let mut files = Vec::new();
    walk(dir, Path::new(""), MAX_DEPTH, &mut files)
        .map_err(|source| SourceError::Read { path: dir.to_owned(), source })?;
    if dir.ends_with(AUTOMODEL_METADATA_DIR) {
        files.retain(|file| !file.name.to_string_lossy().starts_with("fqn_to_"));
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn walk(dir: &Path, below: &Path, depth: usize, files: &mut Vec<HostFile>) -> io::Result<()> {
    for entry in fs::read_dir(dir.join(below))? {
        let entry = entry?;
        let name = below.join(entry.file_name());
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            if depth == 0 {
                tracing::warn!("`{}` lies too deep and is left out", entry.path().display());
            } else if let Err(e) = walk(dir, &name, depth - 1, files) {
                tracing::warn!("`{}` is left out: {e}", entry.path().display());
            }
        } else if !is_left_out(&name) {
            match host_file(name, &entry.path()) {
                Ok(file) => files.extend(file),
                Err(e) => tracing::warn!("`{}` is left out: {e}", entry.path().display()),
            }
        }
    }
    Ok(())
}

/// Files that describe the quantization of the weights beside them, in this order: ModelOpt, GPTQ,
/// AWQ, Quark and bitsandbytes, Ascend's msmodelslim.
const QUANTIZATION_FILES: [&str; 5] = [
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quant_model_description.json",
];

/// Whether a view has its own version of this file, or must not show it.
fn is_left_out(name: &Path) -> bool {
    let file = name.file_name().unwrap_or_default().as_encoded_bytes();
    name == Path::new(CONFIG)
        || QUANTIZATION_FILES.iter().any(|quantization| name == Path::new(quantization))
        || file.ends_with(b".safetensors")
        || file.ends_with(b".safetensors.index.json")
}

/// The host file at `path`, or `None` if it is not a regular file.
fn host_file(name: PathBuf, path: &Path) -> io::Result<Option<HostFile>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Ok(None);
    }
    let (path, bytes, modified) = (fs::canonicalize(path)?, metadata.len(), metadata.modified()?);
    Ok(Some(HostFile { name, path, bytes, modified }))
}
