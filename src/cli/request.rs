//! What is wanted, in values that are checked. [`super::resolve`] makes them of what was typed.

use super::choices::{FloatChoice, KvScalesChoice, LayoutChoice, ScaleFloatChoice, UnmappedChoice};
use crate::daemon::log::LogOptions;
use fuser::{MountOption, SessionACL};
use regex::Regex;
use std::path::PathBuf;

/// What the view is.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// Where the mapping comes from.
    pub mapping: MappingChoice,
    /// Layout of the view; `None` is the other one than the checkpoint's.
    pub to: Option<LayoutChoice>,
    /// What quantized and grouped tensors become.
    pub dtype: FloatChoice,
    /// What an hf view's weights are stored as; `None` is plain floats.
    pub quantize: Option<Quantize>,
    /// How MiMo's K and V scales are read.
    pub kv_scales: KvScalesChoice,
    /// Expert-parallel ranks; `None` is all experts in one.
    pub expert_parallel: Option<ExpertParallel>,
    /// The part of axis 1 of the grouped tensors; `None` is the whole.
    pub expert_shard: Option<ExpertShard>,
    /// Names that are kept; none is all. Anchored at the start.
    pub include: Vec<Regex>,
    /// Names that are left out. Anchored at the start.
    pub exclude: Vec<Regex>,
    /// Names that may be missing. Anchored at the start.
    pub allow_missing: Vec<Regex>,
    /// What becomes of tensors that no rule names.
    pub unmapped: UnmappedChoice,
    /// Largest synthetic shard, in bytes; above 0.
    pub shard_size: u64,
}

/// `--model` and `--mapping`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MappingChoice {
    /// The built-in mapping for the checkpoint's `model_type`.
    Auto,
    /// A built-in mapping.
    Named(String),
    /// A mapping file, as it was named.
    File(PathBuf),
}

/// `--quantize checkpoint`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantize {
    /// Checkpoint whose scales are taken, as it was named; `None` makes new ones.
    pub scales_from: Option<PathBuf>,
    /// Dtype of INT4 scales.
    pub scale_dtype: ScaleFloatChoice,
}

/// `--ep-size` and `--ep-rank`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertParallel {
    /// Number of ranks, above 0.
    pub size: u32,
    /// The rank shown at the root; `None` is a directory for each.
    pub rank: Option<u32>,
}

/// `--ep-shard-size` and `--ep-shard-rank`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertShard {
    /// Number of ranks that share axis 1, above 0.
    pub size: u32,
    /// Below `size`.
    pub rank: u32,
}

/// How the view is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Bytes for decoded chunks.
    pub cache_size: u64,
    /// Threads that answer requests, above 0.
    pub threads: usize,
}

/// How the kernel sees the mount.
#[derive(Clone, Debug)]
pub struct KernelOptions {
    /// Bytes of kernel read-ahead.
    pub read_ahead: u64,
    /// Large reads past the page cache.
    pub direct_io: bool,
    /// Who may see the mount.
    pub acl: SessionACL,
    /// Owner of the files.
    pub uid: u32,
    /// Group of the files.
    pub gid: u32,
    /// Permission bits of the files.
    pub file_mode: u16,
    /// Permission bits of the directories.
    pub dir_mode: u16,
    /// What the mount table shows as the source; `None` is the checkpoint's directory.
    pub fs_name: Option<String>,
    /// Other options of the mount.
    pub extra: Vec<MountOption>,
}

/// Everything about one mount.
#[derive(Clone, Debug)]
pub struct MountRequest {
    /// The checkpoint, as it was named.
    pub src: PathBuf,
    /// The mount point, as it was named.
    pub at: PathBuf,
    /// Whether the mount point may hold files.
    pub nonempty: bool,
    /// Stay in the foreground.
    pub foreground: bool,
    /// What the view is.
    pub plan: PlanOptions,
    /// How it is computed.
    pub engine: EngineOptions,
    /// How the kernel sees it.
    pub kernel: KernelOptions,
    /// What is logged.
    pub log: LogOptions,
}
