//! A command as it will be carried out. [`super::resolve`] makes it from the parsed arguments.

use crate::mount::MountOptions;
use crate::mount::log::LogOptions;
use crate::plan::PlanOptions;
use crate::read::EngineOptions;
use crate::view::ViewOptions;
use std::path::PathBuf;

/// A view of a checkpoint.
#[derive(Clone, Debug)]
pub(super) struct ViewRequest {
    /// The checkpoint, as it was named.
    pub src: PathBuf,
    /// Where the mapping comes from.
    pub mapping: MappingChoice,
    /// Which tensors it has, and in which form. [`super::open`] opens the checkpoint of `scales_from`
    /// and puts it into `plan.quantize`.
    pub plan: PlanOptions,
    /// Checkpoint whose scales are taken, as it was named.
    pub scales_from: Option<PathBuf>,
    /// How its files look.
    pub files: ViewOptions,
}

/// `--model` and `--mapping`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum MappingChoice {
    /// The built-in mapping for the checkpoint's `model_type`.
    Auto,
    /// A built-in mapping.
    Named(String),
    /// A mapping file.
    File(PathBuf),
}

/// A mount.
#[derive(Clone, Debug)]
pub(super) struct MountRequest {
    /// The mount point, as it was named.
    pub at: PathBuf,
    /// Whether the mount point may hold files.
    pub nonempty: bool,
    /// Stay in the foreground.
    pub foreground: bool,
    /// What is mounted.
    pub view: ViewRequest,
    /// How it is computed.
    pub engine: EngineOptions,
    /// How the kernel shows it.
    pub mount: MountOptions,
    /// What is logged.
    pub log: LogOptions,
}
