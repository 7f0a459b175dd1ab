//! Errors of opening a checkpoint and of reading from it.
//!
//! Every message names the file or tensor and, where possible, says what to do.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::first_few::FirstFew;
use super::header::HeaderError;

/// Why a directory cannot be opened as a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The path does not exist.
    #[error("`{path}` does not exist: expected a checkpoint directory")]
    NoDirectory {
        /// What was given.
        path: PathBuf,
    },
    /// The path is not a directory.
    #[error("`{path}` is not a directory: give the checkpoint directory itself")]
    NotADirectory {
        /// What was given.
        path: PathBuf,
    },
    /// Neither a path nor the name of a model in the local hub cache.
    #[error(
        "`{src}` is neither a directory nor a model in the local hub cache (looked for {}); \
         nothing is downloaded: {}set HF_HUB_CACHE where the cache is elsewhere",
        Paths(looked),
        download_advice(src)
    )]
    NotFound {
        /// What was given.
        src: String,
        /// The paths that were tried.
        looked: Vec<PathBuf>,
    },
    /// A hub cache entry from which no snapshot can be chosen.
    #[error(
        "hub cache entry `{entry}` does not say which snapshot to use ({problem}): \
         give one of its `snapshots` directories: {snapshots}"
    )]
    Snapshot {
        /// The `models--org--name` directory.
        entry: PathBuf,
        /// Why no snapshot can be chosen.
        problem: String,
        /// The snapshots of the entry.
        snapshots: FirstFew<String>,
    },
    /// A file or directory could not be read.
    #[error("cannot read `{path}`: {source}")]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// A JSON file larger than any plausible one.
    #[error("`{path}` is too large: expected at most {limit} bytes, got {actual}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Largest size that is read, in bytes.
        limit: u64,
        /// Its size in bytes.
        actual: u64,
    },
    /// A symlink whose target does not exist.
    #[error("`{path}` points to `{target}`, which does not exist{}", resume_advice(*partial))]
    Dangling {
        /// The link.
        path: PathBuf,
        /// Its target.
        target: PathBuf,
        /// Whether there is an unfinished download of the target.
        partial: bool,
    },
    /// A git-LFS pointer instead of a JSON file.
    #[error("`{path}` is a git-LFS pointer, not the file itself: run `git lfs pull`")]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// No config.json.
    #[error(
        "`{dir}` has no `config.json`: give {}",
        match within {
            Some(within) => format!("`{}`, which is a checkpoint", within.display()),
            None => "the directory of a Hugging Face checkpoint".to_owned(),
        }
    )]
    NoConfig {
        /// The directory.
        dir: PathBuf,
        /// A checkpoint in one of its subdirectories.
        within: Option<PathBuf>,
    },
    /// No shards.
    #[error(
        "`{dir}` has neither `model.safetensors.index.json` nor any `*.safetensors`{}",
        incomplete_downloads(*partial)
    )]
    NoShards {
        /// The directory.
        dir: PathBuf,
        /// Number of unfinished downloads that belong to it.
        partial: usize,
    },
    /// config.json or the index is not JSON, or has the wrong structure.
    #[error("`{path}` is not valid: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// The index has file names that are not plain names of safetensors files.
    #[error(
        "`{index}` lists {} outside its directory: \
         expected plain names that end in `.safetensors`, got {names}",
        counted(names.count, "file")
    )]
    FileNames {
        /// The index.
        index: PathBuf,
        /// The rejected names.
        names: FirstFew<String>,
    },
    /// The index lists a tensor twice.
    #[error("`{index}` lists {} more than once: {tensors}", counted(tensors.count, "tensor"))]
    ListedTwice {
        /// The index.
        index: PathBuf,
        /// Names of the tensors.
        tensors: FirstFew<String>,
    },
    /// The index lists no tensor.
    #[error("`{index}` lists no tensor")]
    EmptyIndex {
        /// The index.
        index: PathBuf,
    },
    /// Shards that are missing or invalid.
    #[error(
        "`{dir}`: {} of {total} shards cannot be used: {failures}{}",
        failures.count,
        advice(failures, *partial, other.as_deref())
    )]
    Shards {
        /// The directory.
        dir: PathBuf,
        /// Number of shards of the checkpoint.
        total: usize,
        /// The shards and what is wrong with them.
        failures: FirstFew<ShardFailure>,
        /// Number of unfinished downloads that belong to the directory.
        partial: usize,
        /// A shard of a complete numbered series that the index does not name.
        other: Option<String>,
    },
    /// Tensors that the index lists but their shard does not contain.
    #[error(
        "`{index}` lists {} that {} does not hold: {tensors}",
        counted(tensors.count, "tensor"),
        if tensors.count == 1 { "its shard" } else { "their shard" }
    )]
    MissingTensors {
        /// The index.
        index: PathBuf,
        /// The tensors, each with the shard that should contain it.
        tensors: FirstFew<MissingTensor>,
    },
    /// Tensors that two shards contain.
    #[error(
        "`{dir}`: {} {} in two shards: {tensors}",
        counted(tensors.count, "tensor"),
        if tensors.count == 1 { "is" } else { "are" }
    )]
    StoredTwice {
        /// The directory.
        dir: PathBuf,
        /// The tensors, each with its shards.
        tensors: FirstFew<DuplicateTensor>,
    },
    /// More tensors than fit a `SourceId`.
    #[error("`{dir}` has too many tensors: expected at most {}, got {count}", u32::MAX)]
    TooManyTensors {
        /// The directory.
        dir: PathBuf,
        /// Their number.
        count: usize,
    },
}

/// A shard and what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("`{name}`: {error}")]
pub struct ShardFailure {
    /// File name of the shard.
    pub name: String,
    /// What is wrong.
    pub error: ShardError,
}

/// Why a file cannot be opened as a shard.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// No such file.
    #[error("missing")]
    Missing,
    /// A symlink whose target does not exist, for instance after an interrupted download.
    #[error(
        "a link to `{target}`, which does not exist{}",
        if *partial { " (an `.incomplete` download of it does)" } else { "" }
    )]
    Dangling {
        /// Target of the link.
        target: PathBuf,
        /// Whether there is an unfinished download of the target.
        partial: bool,
    },
    /// A directory, socket or pipe.
    #[error("not a regular file")]
    NotAFile,
    /// A git-LFS pointer instead of the shard.
    #[error(
        "a git-LFS pointer of {actual} bytes, not the {} that it stands for",
        expected.map_or("file".to_owned(), |n| format!("{n} bytes"))
    )]
    LfsPointer {
        /// Size of the real shard in bytes, if the pointer states it.
        expected: Option<u64>,
        /// Size of the pointer in bytes.
        actual: u64,
    },
    /// The file ends before its data does.
    #[error(
        "truncated: expected {}{expected} bytes, got {actual}",
        if *at_least { "at least " } else { "" }
    )]
    Truncated {
        /// Size in bytes according to the header.
        expected: u64,
        /// Whether the header itself is truncated, so that `expected` is a lower bound.
        at_least: bool,
        /// Size of the file in bytes.
        actual: u64,
    },
    /// The file has more bytes after its data.
    #[error("bytes after the last tensor: expected {expected} bytes, got {actual}")]
    Trailing {
        /// Size in bytes according to the header.
        expected: u64,
        /// Size of the file in bytes.
        actual: u64,
    },
    /// The header is invalid.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The file could not be read.
    #[error("{0}")]
    Read(#[from] io::Error),
}

/// A tensor that the index lists but its shard does not contain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingTensor {
    /// Name of the tensor.
    pub tensor: String,
    /// The shard that the index names.
    pub listed_in: String,
    /// Another shard that contains it.
    pub found_in: Option<String>,
}

impl MissingTensor {
    pub(super) fn new(tensor: &str, listed_in: &str, found_in: Option<String>) -> MissingTensor {
        MissingTensor { tensor: tensor.to_owned(), listed_in: listed_in.to_owned(), found_in }
    }
}

impl fmt::Display for MissingTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` (listed in `{}`", self.tensor, self.listed_in)?;
        match &self.found_in {
            Some(found_in) => write!(f, ", stored in `{found_in}`)"),
            None => write!(f, ")"),
        }
    }
}

/// A tensor that two shards contain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DuplicateTensor {
    /// Name of the tensor.
    pub tensor: String,
    /// File names of the two shards.
    pub shards: [String; 2],
}

impl fmt::Display for DuplicateTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` (`{}` and `{}`)", self.tensor, self.shards[0], self.shards[1])
    }
}

/// Why bytes of a tensor could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceReadError {
    /// The shard became shorter after it was opened.
    #[error(
        "shard `{shard}` was truncated after it was opened: expected {wanted} bytes of `{tensor}` \
         at offset {offset}, got a file of {actual} bytes"
    )]
    Truncated {
        /// The shard.
        shard: PathBuf,
        /// The tensor.
        tensor: Box<str>,
        /// Offset in the shard, in bytes.
        offset: u64,
        /// Number of requested bytes.
        wanted: u64,
        /// Current size of the shard, in bytes.
        actual: u64,
    },
    /// The system reports an error.
    #[error("cannot read `{tensor}` at offset {offset} of shard `{shard}`: {source}")]
    Io {
        /// The shard.
        shard: PathBuf,
        /// The tensor.
        tensor: Box<str>,
        /// Offset in the shard, in bytes.
        offset: u64,
        /// The error of the system.
        source: io::Error,
    },
    /// The requested range exceeds the tensor.
    #[error("`{tensor}` has {bytes} bytes: cannot read up to byte {}", EndOffset(*end))]
    OutOfRange {
        /// The tensor.
        tensor: Box<str>,
        /// Its size in bytes.
        bytes: u64,
        /// End of the range, exclusive, relative to the tensor; `None` if it exceeds 64 bits.
        end: Option<u64>,
    },
}

/// Displays the exclusive end of a range.
struct EndOffset(Option<u64>);

impl fmt::Display for EndOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(end) => write!(f, "{end}"),
            None => write!(f, "2^64"),
        }
    }
}

/// Displays a list of paths.
struct Paths<'a>(&'a [PathBuf]);

impl fmt::Display for Paths<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, path) in self.0.iter().enumerate() {
            write!(f, "{}`{}`", if i == 0 { "" } else { ", " }, path.display())?;
        }
        Ok(())
    }
}

/// Formats a count with its noun: `1 shard`, `2 shards`.
pub(super) fn counted(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

/// Says how to download `src` if it has the form of a model name, `org/name`. A single word is more
/// often a mistyped directory.
fn download_advice(src: &str) -> String {
    if src.contains('/') {
        format!("fetch it with `hf download {src}`, or ")
    } else {
        String::new()
    }
}

fn resume_advice(partial: bool) -> &'static str {
    if partial { ": its download is incomplete, run `hf download` again" } else { "" }
}

fn incomplete_downloads(partial: usize) -> String {
    match partial {
        0 => String::new(),
        1 => "; 1 `*.incomplete` download is there, run `hf download` again".to_owned(),
        n => format!("; {n} `*.incomplete` downloads are there, run `hf download` again"),
    }
}

/// Says what to do about shards that cannot be used, going by the first few.
fn advice(failures: &FirstFew<ShardFailure>, partial: usize, other: Option<&str>) -> String {
    let any = |f: fn(&ShardError) -> bool| failures.first.iter().any(|s| f(&s.error));
    if let (Some(other), true) = (other, any(|e| matches!(e, ShardError::Missing))) {
        return format!(
            "; the index is out of date: the directory has a complete set of shards with other \
             names (`{other}` …), remove the index to use those"
        );
    }
    if any(|e| matches!(e, ShardError::LfsPointer { .. })) {
        "; run `git lfs pull`".to_owned()
    } else if partial > 0 {
        incomplete_downloads(partial)
    } else if any(|e| {
        matches!(
            e,
            ShardError::Missing | ShardError::Dangling { .. } | ShardError::Truncated { .. }
        )
    }) {
        "; complete the download, for instance with `hf download`".to_owned()
    } else {
        String::new()
    }
}
