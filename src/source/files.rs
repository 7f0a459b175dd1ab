//! The files beside the shards: tokenizer, code, readme.
//!
//! Left out are what a view makes anew (config.json, the index, the shards), files that say how
//! the source's weights are quantized (loaders read some of them before config.json, and a view is
//! quantized in its own way or not at all), safetensors files that are no shards (loaders take
//! every `*.safetensors` for a shard) and hidden files. Of a save of NeMo Automodel the files in
//! `.hf_metadata` are shown, and not what stands beside the shards: a consolidated copy. Weights
//! in other formats stay. Links to files are followed, links to directories are not: they lead
//! out of the checkpoint, or round in circles.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::error::SourceError;

/// Deepest directory that is looked into.
const MAX_DEPTH: usize = 16;

/// Where NeMo Automodel puts config.json, the tokenizer and its own notes (`fqn_to_*.json`).
pub(super) const SAVED: &str = ".hf_metadata";

/// The settings of a model.
pub(super) const CONFIG: &str = "config.json";

/// A file that a view passes through unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostFile {
    /// Path relative to the checkpoint directory.
    pub name: PathBuf,
    /// The file itself, absolute, links resolved.
    pub path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// Time of the last change.
    pub modified: SystemTime,
}

/// The host files of a directory with a config.json, sorted by name.
pub(super) fn host_files(dir: &Path) -> Result<Vec<HostFile>, SourceError> {
    let mut files = Vec::new();
    walk(dir, Path::new(""), MAX_DEPTH, &mut files)
        .map_err(|source| SourceError::Read { path: dir.to_owned(), source })?;
    if dir.ends_with(SAVED) {
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
        } else if !is_rebuilt(&name) {
            match host_file(name, &entry.path()) {
                Ok(file) => files.extend(file),
                Err(e) => tracing::warn!("`{}` is left out: {e}", entry.path().display()),
            }
        }
    }
    Ok(())
}

/// Files that say how the weights beside them are quantized: ModelOpt, GPTQ, AWQ, Quark and
/// bitsandbytes, Ascend's msmodelslim.
const QUANTIZATION_FILES: [&str; 5] = [
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quant_model_description.json",
];

/// Whether a view has its own in the place of this file, or must not have it.
fn is_rebuilt(name: &Path) -> bool {
    let file = name.file_name().unwrap_or_default().as_encoded_bytes();
    name == Path::new(CONFIG)
        || QUANTIZATION_FILES.iter().any(|quantization| name == Path::new(quantization))
        || file.ends_with(b".safetensors")
        || file.ends_with(b".safetensors.index.json")
}

/// `None` where `path` is no regular file.
fn host_file(name: PathBuf, path: &Path) -> io::Result<Option<HostFile>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Ok(None);
    }
    let (path, bytes, modified) = (fs::canonicalize(path)?, metadata.len(), metadata.modified()?);
    Ok(Some(HostFile { name, path, bytes, modified }))
}
