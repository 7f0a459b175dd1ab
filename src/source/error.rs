//! What can be wrong with a checkpoint, and with a read from it.
//!
//! Every message names the object and, where there is one, the way out.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::header::HeaderError;
use super::several::Several;

/// Why a directory is refused as a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Nothing is there.
    #[error("`{path}` does not exist: expected a checkpoint directory")]
    NoDirectory {
        /// What was given.
        path: PathBuf,
    },
    /// Something else than a directory is there.
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
        fetch(src)
    )]
    NotFound {
        /// What was given.
        src: String,
        /// Where it would have been.
        looked: Vec<PathBuf>,
    },
    /// A hub cache entry that does not say which snapshot is meant.
    #[error(
        "hub cache entry `{entry}` does not say which snapshot to use ({problem}): \
         give one of its `snapshots` directories: {snapshots}"
    )]
    Snapshot {
        /// The `models--org--name` directory.
        entry: PathBuf,
        /// What keeps a snapshot from being chosen.
        problem: String,
        /// The snapshots that are there.
        snapshots: Several<String>,
    },
    /// A file or directory that the system will not give out.
    #[error("cannot read `{path}`: {source}")]
    Read {
        /// What was to be read.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file far beyond any that was ever published.
    #[error("`{path}` is too large: expected at most {limit} bytes, got {actual}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Largest size that is read, in bytes.
        limit: u64,
        /// Its size in bytes.
        actual: u64,
    },
    /// A symlink whose target is gone.
    #[error("`{path}` points to `{target}`, which does not exist{}", finish(*partial))]
    Dangling {
        /// The link.
        path: PathBuf,
        /// Where it points.
        target: PathBuf,
        /// Whether an unfinished download of the target is there.
        partial: bool,
    },
    /// A git-LFS pointer in the place of a JSON file.
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
        /// A checkpoint within it.
        within: Option<PathBuf>,
    },
    /// No shard at all.
    #[error(
        "`{dir}` has neither `model.safetensors.index.json` nor any `*.safetensors`{}",
        incomplete(*partial)
    )]
    NoShards {
        /// The directory.
        dir: PathBuf,
        /// Number of unfinished downloads that belong to it.
        partial: usize,
    },
    /// config.json or the index is not the JSON that it should be.
    #[error("`{path}` is not valid: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// The index names files by something else than their plain names.
    #[error(
        "`{index}` lists {} outside its directory: \
         expected plain names that end in `.safetensors`, got {names}",
        counted(names.count, "file")
    )]
    FileNames {
        /// The index.
        index: PathBuf,
        /// The names that are refused.
        names: Several<String>,
    },
    /// The index lists a tensor twice.
    #[error("`{index}` lists {} more than once: {tensors}", counted(tensors.count, "tensor"))]
    ListedTwice {
        /// The index.
        index: PathBuf,
        /// Names of the tensors.
        tensors: Several<String>,
    },
    /// The index lists no tensor.
    #[error("`{index}` lists no tensor")]
    EmptyIndex {
        /// The index.
        index: PathBuf,
    },
    /// Shards that are not there or not whole.
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
        /// What is wrong with which.
        failures: Several<ShardFailure>,
        /// Number of unfinished downloads that belong to the directory.
        partial: usize,
        /// A shard of another, complete series in the directory, where an index names the shards.
        other: Option<String>,
    },
    /// Tensors that the index lists and their shard lacks.
    #[error(
        "`{index}` lists {} that {} does not hold: {tensors}",
        counted(tensors.count, "tensor"),
        if tensors.count == 1 { "its shard" } else { "their shard" }
    )]
    MissingTensors {
        /// The index.
        index: PathBuf,
        /// The tensors, each with the shard that was to hold it.
        tensors: Several<Misplaced>,
    },
    /// Tensors that two shards hold.
    #[error(
        "`{dir}`: {} {} in two shards: {tensors}",
        counted(tensors.count, "tensor"),
        if tensors.count == 1 { "is" } else { "are" }
    )]
    StoredTwice {
        /// The directory.
        dir: PathBuf,
        /// The tensors, each with its shards.
        tensors: Several<StoredTwice>,
    },
    /// More tensors than an id can number.
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

/// Why a file is refused as a shard.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// No such file.
    #[error("missing")]
    Missing,
    /// A symlink whose target is gone, as an interrupted download leaves it.
    #[error(
        "a link to `{target}`, which does not exist{}",
        if *partial { " (an `.incomplete` download of it does)" } else { "" }
    )]
    Dangling {
        /// Where the link points.
        target: PathBuf,
        /// Whether an unfinished download of the target is there.
        partial: bool,
    },
    /// A directory, socket or pipe.
    #[error("not a regular file")]
    NotAFile,
    /// The git-LFS pointer of the shard.
    #[error(
        "a git-LFS pointer of {actual} bytes, not the {} that it stands for",
        expected.map_or("file".to_owned(), |n| format!("{n} bytes"))
    )]
    LfsPointer {
        /// Size of the real shard in bytes, where the pointer says it.
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
        /// Size in bytes that the header asks for.
        expected: u64,
        /// Whether the header itself is cut, so that only a lower bound is known.
        at_least: bool,
        /// Size of the file in bytes.
        actual: u64,
    },
    /// The file goes on after its data.
    #[error("bytes after the last tensor: expected {expected} bytes, got {actual}")]
    Trailing {
        /// Size in bytes that the header asks for.
        expected: u64,
        /// Size of the file in bytes.
        actual: u64,
    },
    /// The header is refused.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The system will not give the file out.
    #[error("{0}")]
    Read(#[from] io::Error),
}

/// A tensor that its shard lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misplaced {
    /// Name of the tensor.
    pub tensor: String,
    /// The shard that the index gives.
    pub listed: String,
    /// The shard that holds it instead.
    pub stored: Option<String>,
}

impl Misplaced {
    pub(super) fn new(tensor: &str, listed: &str, stored: Option<String>) -> Misplaced {
        Misplaced { tensor: tensor.to_owned(), listed: listed.to_owned(), stored }
    }
}

impl fmt::Display for Misplaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` (listed in `{}`", self.tensor, self.listed)?;
        match &self.stored {
            Some(stored) => write!(f, ", stored in `{stored}`)"),
            None => write!(f, ")"),
        }
    }
}

/// A tensor that two shards hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTwice {
    /// Name of the tensor.
    pub tensor: String,
    /// File names of the two shards.
    pub shards: [String; 2],
}

impl fmt::Display for StoredTwice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` (`{}` and `{}`)", self.tensor, self.shards[0], self.shards[1])
    }
}

/// Why bytes of a tensor cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceReadError {
    /// The shard has shrunk since it was opened.
    #[error(
        "shard `{shard}` was truncated after it was opened: expected {wanted} bytes of `{tensor}` \
         at offset {offset}, got a file of {actual} bytes"
    )]
    Truncated {
        /// The shard.
        shard: PathBuf,
        /// The tensor.
        tensor: Box<str>,
        /// Absolute offset in the shard, in bytes.
        offset: u64,
        /// Bytes asked for.
        wanted: u64,
        /// Size of the shard now, in bytes.
        actual: u64,
    },
    /// The system reports an error.
    #[error("cannot read `{tensor}` at offset {offset} of shard `{shard}`: {source}")]
    Io {
        /// The shard.
        shard: PathBuf,
        /// The tensor.
        tensor: Box<str>,
        /// Absolute offset in the shard, in bytes.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The request does not lie within the tensor.
    #[error("`{tensor}` has {bytes} bytes: cannot read up to byte {}", End(*end))]
    OutOfRange {
        /// The tensor.
        tensor: Box<str>,
        /// Its size in bytes.
        bytes: u64,
        /// First byte after the request, relative to the tensor; `None` beyond 2^64.
        end: Option<u64>,
    },
}

struct End(Option<u64>);

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(end) => write!(f, "{end}"),
            None => write!(f, "2^64"),
        }
    }
}

struct Paths<'a>(&'a [PathBuf]);

impl fmt::Display for Paths<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, path) in self.0.iter().enumerate() {
            write!(f, "{}`{}`", if i == 0 { "" } else { ", " }, path.display())?;
        }
        Ok(())
    }
}

/// A number of things, in words.
pub(super) fn counted(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

/// How to fetch what may be the name of a model; a bare word is more often a mistyped directory.
fn fetch(src: &str) -> String {
    if src.contains('/') {
        format!("fetch it with `hf download {src}`, or ")
    } else {
        String::new()
    }
}

fn finish(partial: bool) -> &'static str {
    if partial { ": its download is incomplete, run `hf download` again" } else { "" }
}

fn incomplete(partial: usize) -> String {
    match partial {
        0 => String::new(),
        1 => "; 1 `*.incomplete` download is there, run `hf download` again".to_owned(),
        n => format!("; {n} `*.incomplete` downloads are there, run `hf download` again"),
    }
}

/// What to do about shards that cannot be used, judged by the first few.
fn advice(failures: &Several<ShardFailure>, partial: usize, other: Option<&str>) -> String {
    let any = |f: fn(&ShardError) -> bool| failures.first.iter().any(|s| f(&s.error));
    if let (Some(other), true) = (other, any(|e| matches!(e, ShardError::Missing))) {
        return format!(
            "; the index is out of date: a complete set of shards with other names is there \
             (`{other}` …), which is used where the index is removed"
        );
    }
    if any(|e| matches!(e, ShardError::LfsPointer { .. })) {
        "; run `git lfs pull`".to_owned()
    } else if partial > 0 {
        incomplete(partial)
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
