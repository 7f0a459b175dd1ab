//! Requests: the checked form of a command line, which the commands carry out. [`super::resolve`] builds
//! them from the parsed arguments.

use crate::mount::MountOptions;
use crate::mount::log::LogOptions;
use crate::plan::PlanOptions;
use crate::read::EngineOptions;
use crate::view::ViewOptions;
use std::path::PathBuf;

/// A view of a checkpoint, as requested.
#[derive(Clone, Debug)]
pub(super) struct ViewRequest {
    /// The checkpoint as given: a path, or a name in the local hub cache.
    pub src: PathBuf,
    /// Where the mapping comes from.
    pub mapping: MappingChoice,
    /// Which tensors the view has, and in which form. `quantize.original` is still `None`:
    /// [`super::open`] opens the checkpoint of `scales_from` and puts it there.
    pub plan: PlanOptions,
    /// Checkpoint whose scales are used, as given.
    pub scales_from: Option<PathBuf>,
    /// Shard size, owner and modes of the view's files.
    pub files: ViewOptions,
}

/// Which mapping to use: the values of `--model` and `--mapping`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum MappingChoice {
    /// The built-in mapping for the checkpoint's `model_type`.
    Auto,
    /// The built-in mapping of this name.
    Named(String),
    /// A mapping in a file.
    File(PathBuf),
}

/// A mount of a view, as requested.
#[derive(Clone, Debug)]
pub(super) struct MountRequest {
    /// The mount point as given.
    pub at: PathBuf,
    /// Accept a mount point that is not empty.
    pub nonempty: bool,
    /// Stay in the foreground.
    pub foreground: bool,
    /// What is mounted.
    pub view: ViewRequest,
    /// Cache, threads and direct I/O of the engine.
    pub engine: EngineOptions,
    /// How the kernel mounts it.
    pub mount: MountOptions,
    /// What is logged, where and how.
    pub log: LogOptions,
}
