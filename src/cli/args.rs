//! The command line as clap parses it: commands, options, and their help texts. The doc comments of fields
//! are what `-h` (first line) and `--help` (all of it) print. [`super::resolve`] turns the parsed arguments
//! into requests.

use super::choices::{
    DTYPES, KV_SCALES, LAYOUTS, LOG_FORMATS, LOG_LEVELS, QUANTIZE, SCALE_DTYPES, UNMAPPED, one_of,
};
use super::size::Size;
use crate::codec::Level as SimdLevel;
use crate::mapping::LayoutName;
use crate::plan::{ScaleReading, Unmapped};
use crate::tensor::Float;
use clap::{ArgAction, Args, Parser, Subcommand, value_parser};
use regex::Regex;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use tracing::Level;

/// Mount a Hugging Face checkpoint in another layout
///
/// The mount shows safetensors files that do not exist on disk: their bytes are computed from the
/// checkpoint when they are read. Nothing is written or downloaded, and the checkpoint is not changed.
///
/// Without a subcommand, mounts SRC at MNT. The command returns once the mount answers, prints
/// one line, and serves the mount in the background until `mount-ckpt umount MNT`.
#[derive(Debug, Parser)]
#[command(
    name = "mount-ckpt",
    version,
    long_version = long_version(),
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    args_override_self = true,
    max_term_width = 100,
    override_usage = "mount-ckpt [OPTIONS] <SRC> <MNT>\n       mount-ckpt <COMMAND>",
    after_help = "Sizes: 512MiB, 5GB, or a number of bytes. Exit codes: 0 for success, 2 for a usage \
                  error, 1 for anything else that is refused or fails."
)]
pub(super) struct Cli {
    /// A command other than mounting.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The arguments of a mount, the default command.
    #[command(flatten)]
    pub mount: MountArgs,
}

/// What `--version` says: of what the program was built, and what it runs on this machine.
fn long_version() -> String {
    let commit = option_env!("MOUNT_CKPT_COMMIT").unwrap_or("unknown");
    // Fastest first; the first is the one that decodes.
    let kernels: Vec<&str> =
        SimdLevel::available().into_iter().rev().map(SimdLevel::name).collect();
    format!(
        "{}\ncommit {commit}, {}, kernels: {} ({} is used)",
        env!("CARGO_PKG_VERSION"),
        env!("MOUNT_CKPT_TARGET"),
        kernels.join(", "),
        SimdLevel::best().name()
    )
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Show a checkpoint's tensors and how a view would be computed, without mounting
    Inspect(InspectArgs),
    /// Make every check that a mount makes, then read all data
    ///
    /// Reads the whole view once, through the same engine as a mount, and exits with 1 if anything fails.
    Verify(VerifyArgs),
    /// Write the view to a directory, without FUSE
    ///
    /// Needs free space for the whole view. An interrupted export continues when it is started again
    /// with the same options: a file is called `NAME.partial` until it is complete, and complete files
    /// are kept.
    Export(ExportArgs),
    /// List all mounts, or show the counters of one
    Status(StatusArgs),
    /// Unmount views
    Umount(UmountArgs),
    /// List the built-in mappings and the model_type values that select them
    Models(ModelsArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Print the manual page
    Man(ManArgs),
}

/// Arguments of a mount, the default command.
#[derive(Debug, Args)]
pub(super) struct MountArgs {
    /// Checkpoint: a directory, a hub cache entry or snapshot, or org/name in the local hub cache
    ///
    /// `org/name` is looked up in $HF_HUB_CACHE, in $HF_HOME/hub if that is not set, and else in
    /// ~/.cache/huggingface/hub. Nothing is downloaded.
    #[arg(value_name = "SRC", required = true)]
    pub src: Option<PathBuf>,
    /// Mount point: an empty directory outside the checkpoint
    #[arg(value_name = "MNT", required = true)]
    pub at: Option<PathBuf>,
    /// Options as in mount(8) and fstab, separated by commas
    ///
    /// Every long option works here too, with dashes or underscores: `-o model=mimo-v2-flash,to=hf`.
    /// Others are ro, nosuid, nodev, noexec, noatime, nonempty (hide what is in the mount point),
    /// fsname=NAME (source in the mount table), and those of fstab such as _netdev, nofail, noauto and
    /// x-systemd.automount. Write a comma in a value as `\,`. An option given both ways has the value of
    /// the long option.
    #[arg(short = 'o', value_name = "OPTS")]
    pub options: Vec<String>,
    /// Stay in the foreground and log to stderr
    ///
    /// Ctrl-C or SIGTERM unmounts. For a systemd service, use this with `Type=notify`.
    #[arg(short = 'f', long)]
    pub foreground: bool,
    /// What the view shows.
    #[command(flatten)]
    pub view: ViewArgs,
    /// Memory and threads.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// How it is mounted.
    #[command(flatten)]
    pub kernel: KernelArgs,
    /// What is logged.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Options for what the view shows.
#[derive(Debug, Args)]
#[command(next_help_heading = "View")]
pub(super) struct ViewArgs {
    /// Mapping to use
    ///
    /// `mount-ckpt models` lists the names. `auto` selects the mapping for the model_type in
    /// config.json.
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub model: String,
    /// File with a mapping of your own, in TOML
    ///
    /// For a model that has no built-in mapping.
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    pub mapping: Option<PathBuf>,
    /// Layout of the view [default: native for a checkpoint in layout hf, hf for any other]
    ///
    /// The layout decides the names of the tensors, and whether the experts of a layer are separate
    /// tensors or grouped in one.
    #[arg(long, value_name = "LAYOUT", value_parser = one_of(LAYOUTS))]
    pub to: Option<LayoutName>,
    /// Dtype of tensors that are dequantized or grouped
    ///
    /// All other tensors keep the dtype that they have in the checkpoint, for instance router gates in
    /// F32.
    #[arg(long, value_name = "T", value_parser = one_of(DTYPES), default_value = "bf16")]
    pub dtype: Float,
    /// With --to hf: quantize the weights
    ///
    /// `checkpoint` quantizes the tensors that the model's published checkpoints hold quantized, with
    /// the same scheme (FP8, FP4 or INT4, with scales). The scales are computed from the largest
    /// magnitude of each block, or taken from --scales-from.
    #[arg(long, value_name = "Q", value_parser = one_of(QUANTIZE), default_value = "none",
        action = ArgAction::Set)]
    pub quantize: bool,
    /// With --quantize checkpoint: take the scales from this checkpoint
    ///
    /// Give the published checkpoint that the weights come from. Weights that were not changed since
    /// then get their published bytes back.
    #[arg(long, value_name = "DIR")]
    pub scales_from: Option<PathBuf>,
    /// With --quantize checkpoint: dtype of the scales of INT4 weights
    #[arg(long, value_name = "T", value_parser = one_of(SCALE_DTYPES), default_value = "bf16")]
    pub scale_dtype: Float,
    /// For MiMo: which rows of scales belong to which rows of K and V
    ///
    /// `fused` is how the checkpoint was quantized. `automodel` reproduces how NeMo Automodel 0.7.0
    /// reads it, to compare with a run that used it.
    #[arg(long, value_name = "R", value_parser = one_of(KV_SCALES), default_value = "fused")]
    pub kv_scales: ScaleReading,
    /// Number of expert-parallel ranks: adds a directory for each
    ///
    /// Each directory ep-RANK-of-SIZE is a whole checkpoint with the experts of one rank and all other
    /// tensors.
    #[arg(long, value_name = "N", value_parser = ranks())]
    pub ep_size: Option<u64>,
    /// With --ep-size: show only the checkpoint of this rank, counted from 0, in the root
    #[arg(long, value_name = "R", requires = "ep_size")]
    pub ep_rank: Option<u64>,
    /// Number of ranks that divide axis 1 of the grouped tensors among them
    ///
    /// The axis must be a multiple of it.
    #[arg(long, value_name = "N", value_parser = ranks(), requires = "ep_shard_rank")]
    pub ep_shard_size: Option<u64>,
    /// With --ep-shard-size: the rank, counted from 0, whose part of axis 1 is shown
    #[arg(long, value_name = "R", requires = "ep_shard_size")]
    pub ep_shard_rank: Option<u64>,
    /// Show only tensors whose name in the view matches; can be repeated
    ///
    /// A regular expression. It must match from the start of the name, not up to its end.
    #[arg(long, value_name = "RE", value_parser = parse_pattern)]
    pub include: Vec<Regex>,
    /// Leave out tensors whose name in the view matches, even if --include matches; can be repeated
    ///
    /// A regular expression. It must match from the start of the name, not up to its end.
    #[arg(long, value_name = "RE", value_parser = parse_pattern)]
    pub exclude: Vec<Regex>,
    /// What to do with tensors of the checkpoint that no rule of the mapping matches
    #[arg(long, value_name = "A", value_parser = one_of(UNMAPPED), default_value = "refuse")]
    pub unmapped: Unmapped,
    /// Accept that tensors or layers of these names are missing; can be repeated
    ///
    /// A checkpoint that lacks a tensor or a layer of its model is refused otherwise. A regular
    /// expression for the published names. It must match from the start of the name, not up to its end.
    /// The line that a mount prints names what is missing.
    #[arg(long, value_name = "RE", value_parser = parse_pattern)]
    pub allow_missing: Vec<Regex>,
    /// Most bytes of tensors in a safetensors file of the view
    ///
    /// A tensor that is larger gets a file of its own.
    #[arg(long, value_name = "SIZE", default_value_t = Size(5_000_000_000), value_parser = parse_shard_size)]
    pub shard_size: Size,
}

/// Options for the memory and the threads that compute the view.
#[derive(Debug, Args)]
#[command(next_help_heading = "Resources")]
pub(super) struct EngineArgs {
    /// Most memory for decoded chunks [default: 1GiB, or a quarter of the memory if that is less]
    ///
    /// Bounds chunks that are being decoded and an LRU cache of decoded ones. The cache serves requests
    /// that are smaller than a chunk, and readers that bypass the page cache. A quarter of it, at most
    /// 256MiB, holds source rows of matrices that are being transposed. Bytes that were served stay in
    /// the kernel's page cache, which is not counted. For the default, the memory is the limit of the
    /// process's control group or, if that is less, the memory of the machine.
    #[arg(long, value_name = "SIZE")]
    pub cache_size: Option<Size>,
    /// Number of threads that answer requests [default: the cores that this process may use]
    ///
    /// The same number of further threads prefetch for sequential readers.
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
}

/// Options for how the view is mounted.
#[derive(Debug, Args)]
#[command(next_help_heading = "Mount")]
pub(super) struct KernelArgs {
    /// Kernel read-ahead of the mount; only root can change it from 128KiB
    ///
    /// How far the kernel reads ahead of a sequential reader. It also bounds the size of one request for
    /// a memory-mapped file. A larger value is faster for a single reader of large files. 0 keeps the
    /// kernel's default.
    #[arg(long, value_name = "SIZE", default_value_t = Size(4 << 20))]
    pub read_ahead: Size,
    /// Let reads of safetensors files bypass the page cache
    ///
    /// Faster for a program that reads each byte once, with several threads, in large reads and into
    /// page-aligned buffers. Slower for small reads, and a second reader does not find the bytes in the
    /// page cache: they are computed again.
    #[arg(long)]
    pub direct_io: bool,
    /// Let all users access the mount
    ///
    /// Unless root mounts, /etc/fuse.conf must have the line `user_allow_other`.
    #[arg(long)]
    pub allow_other: bool,
    /// Let root access the mount of another user
    ///
    /// Unless root mounts, /etc/fuse.conf must have the line `user_allow_other`.
    #[arg(long)]
    pub allow_root: bool,
    /// Unmount also if the process is killed
    ///
    /// fusermount3 watches the process and unmounts when it ends. It requires that other users can access
    /// the mount, so this implies --allow-root unless --allow-other is given.
    #[arg(long)]
    pub auto_unmount: bool,
    /// Numeric user id of the owner of all files [default: the user who mounts]
    #[arg(long, value_name = "UID")]
    pub uid: Option<u32>,
    /// Numeric group id of all files [default: the group of the user who mounts]
    #[arg(long, value_name = "GID")]
    pub gid: Option<u32>,
    /// Permission bits of files, in octal
    #[arg(long, value_name = "MODE", value_parser = parse_mode, default_value = "0444")]
    pub file_mode: u16,
    /// Permission bits of directories, in octal
    #[arg(long, value_name = "MODE", value_parser = parse_mode, default_value = "0555")]
    pub dir_mode: u16,
}

/// Options of the log.
#[derive(Debug, Args)]
#[command(next_help_heading = "Log")]
pub(super) struct LogArgs {
    /// Least severe level that is logged [default: info for a mount, warn for other commands]
    #[arg(long, value_name = "LEVEL", value_parser = one_of(LOG_LEVELS))]
    pub log_level: Option<Level>,
    /// Append the log to this file [default: stderr, or the system log for a background mount]
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Form of the lines of the log
    #[arg(long, value_name = "FORMAT", value_parser = one_of(LOG_FORMATS), default_value = "text",
        action = ArgAction::Set)]
    pub log_format: bool,
}

/// Options of `inspect`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(super) struct InspectArgs {
    /// Checkpoint: a directory, a hub cache entry or snapshot, or org/name in the local hub cache
    #[arg(value_name = "SRC")]
    pub src: PathBuf,
    /// Print the plan as JSON, as in .mount-ckpt/plan.json
    #[arg(long)]
    pub json: bool,
    /// What the view shows.
    #[command(flatten)]
    pub view: ViewArgs,
    /// What is logged.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Options of `verify`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(super) struct VerifyArgs {
    /// Checkpoint: a directory, a hub cache entry or snapshot, or org/name in the local hub cache
    #[arg(value_name = "SRC")]
    pub src: PathBuf,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    /// What the view shows.
    #[command(flatten)]
    pub view: ViewArgs,
    /// Memory and threads.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// What is logged.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Options of `export`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(super) struct ExportArgs {
    /// Checkpoint: a directory, a hub cache entry or snapshot, or org/name in the local hub cache
    #[arg(value_name = "SRC")]
    pub src: PathBuf,
    /// Directory to write to: new, empty, or that of an interrupted export with the same options
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// What the view shows.
    #[command(flatten)]
    pub view: ViewArgs,
    /// Memory and threads.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// What is logged.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Options of `status`.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Mount point; without it, all mounts are listed
    #[arg(value_name = "MNT")]
    pub at: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `umount`.
#[derive(Debug, Args)]
pub(super) struct UmountArgs {
    /// Mount points
    #[arg(value_name = "MNT", required = true)]
    pub at: Vec<PathBuf>,
    /// Detach mounts that are in use: their files stay readable until they are closed
    #[arg(short = 'l', long)]
    pub lazy: bool,
    /// Succeed silently if nothing is mounted there
    #[arg(short = 'q', long)]
    pub quiet: bool,
}

/// Options of `models`.
#[derive(Debug, Args)]
pub(super) struct ModelsArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `completions`.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// Shell to print the script for
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

/// Options of `man`.
#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// Write a page for each command into this directory instead of printing one
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Parser of a number of ranks: at least 1.
fn ranks() -> impl clap::builder::TypedValueParser<Value = u64> {
    value_parser!(u64).range(1..=u64::from(u32::MAX))
}

fn parse_shard_size(text: &str) -> Result<Size, String> {
    match text.parse() {
        Ok(Size(0)) => Err("expected at least 1 byte".to_owned()),
        size => size.map_err(|error| error.to_string()),
    }
}

/// Parses a regular expression. Of the multi-line error of `regex`, keeps the line with the reason.
fn parse_pattern(text: &str) -> Result<Regex, String> {
    Regex::new(text).map_err(|error| {
        let why = error.to_string();
        let why = why.lines().last().unwrap_or_default();
        why.strip_prefix("error: ").unwrap_or(why).to_owned()
    })
}

fn parse_mode(text: &str) -> Result<u16, String> {
    match u16::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(format!("expected octal permission bits such as 0444, got `{text}`")),
    }
}
