//! What a person may type, as typed. [`super::resolve`] turns it into values that are checked.

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
/// Shows a checkpoint directory as another one: safetensors files that do not exist, computed as
/// they are read. Nothing is written, nothing is downloaded, and the source is left as it is.
///
/// Without a subcommand, mounts SRC at MNT. The command comes back once the mount answers, prints
/// one line, and goes on in the background until `mount-ckpt umount MNT`.
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
    after_help = "Sizes: 512MiB, 5GB, plain bytes. Exit codes: 0; 2 for a usage error; 1 for \
                  anything refused or failed."
)]
pub(super) struct Cli {
    /// Something other than mounting.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The default command.
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
    /// Show what is there, what the view would be and what it costs; mounts nothing
    Inspect(InspectArgs),
    /// Make every check that a mount makes, then read and check the data
    ///
    /// Exits with 1 where anything fails. Reads the whole view once, through the same engine as a
    /// mount.
    Verify(VerifyArgs),
    /// Write the view to a directory: the same engine, no FUSE
    ///
    /// Needs room for the whole view. Interrupted, it takes up where it left when started again
    /// with the same options: a file is `NAME.partial` until it is complete, and complete files
    /// are kept.
    Export(ExportArgs),
    /// List the mounts that are up, or show the live counters of one
    Status(StatusArgs),
    /// Unmount
    Umount(UmountArgs),
    /// List the mappings and the model_type that each is for
    Models(ModelsArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Print the manual page
    Man(ManArgs),
}

/// Options of the default command.
#[derive(Debug, Args)]
pub(super) struct MountArgs {
    /// Checkpoint: a directory, a hub cache entry or snapshot, or org/name in the local hub cache
    ///
    /// `org/name` is looked up in HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub. Nothing is
    /// downloaded.
    #[arg(value_name = "SRC", required = true)]
    pub src: Option<PathBuf>,
    /// Mount point: an empty directory
    #[arg(value_name = "MNT", required = true)]
    pub at: Option<PathBuf>,
    /// mount(8) options, comma separated
    ///
    /// Every long option works here too, with dashes or underscores: `-o model=mimo-v2-flash,to=hf`.
    /// So do ro, nosuid, nodev, noexec, noatime, allow_other, nonempty, fsname=NAME and the words
    /// of fstab such as _netdev, nofail, noauto, x-systemd.automount. A comma in a value is written
    /// `\,`. On the command line, a long option beats the same one in -o.
    #[arg(short = 'o', value_name = "OPTS")]
    pub options: Vec<String>,
    /// Stay in the foreground and log to stderr
    ///
    /// Ctrl-C or SIGTERM unmounts. With systemd, use this and `Type=notify`.
    #[arg(short = 'f', long)]
    pub foreground: bool,
    /// What the view is.
    #[command(flatten)]
    pub view: ViewArgs,
    /// How it is computed.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// How the kernel sees it.
    #[command(flatten)]
    pub kernel: KernelArgs,
    /// What is logged.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Options that say what the view is.
#[derive(Debug, Args)]
#[command(next_help_heading = "View")]
pub(super) struct ViewArgs {
    /// Mapping to use, as `mount-ckpt models` lists them; `auto` reads config.json
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub model: String,
    /// A mapping of your own (TOML)
    ///
    /// For a model that no built-in mapping knows. Used in place of --model.
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    pub mapping: Option<PathBuf>,
    /// Layout of the view [default: native from an hf checkpoint, hf from a native one]
    #[arg(long, value_name = "LAYOUT", value_parser = one_of(LAYOUTS))]
    pub to: Option<LayoutName>,
    /// What quantized and grouped tensors become
    ///
    /// Tensors that are neither keep their dtype: router gates, for one, are F32.
    #[arg(long, value_name = "T", value_parser = one_of(DTYPES), default_value = "bf16")]
    pub dtype: Float,
    /// With --to hf: what the weights are stored as
    ///
    /// `checkpoint` is the model's own scheme (FP8, FP4, INT4 with their scales), for the tensors
    /// that the model's published checkpoints hold in it.
    #[arg(long, value_name = "Q", value_parser = one_of(QUANTIZE), default_value = "none",
        action = ArgAction::Set)]
    pub quantize: bool,
    /// With --quantize checkpoint: take the scales from this checkpoint
    ///
    /// A weight that did not change then gets the very bytes back that it has there.
    #[arg(long, value_name = "DIR")]
    pub scales_from: Option<PathBuf>,
    /// With --quantize checkpoint: dtype of INT4 scales
    #[arg(long, value_name = "T", value_parser = one_of(SCALE_DTYPES), default_value = "bf16")]
    pub scale_dtype: Float,
    /// MiMo: which scale rows serve which rows of K and V
    ///
    /// `fused` is how the checkpoint was quantized. `automodel` is how NeMo Automodel 0.7.0 reads
    /// it, for comparing with a run that did.
    #[arg(long, value_name = "R", value_parser = one_of(KV_SCALES), default_value = "fused")]
    pub kv_scales: ScaleReading,
    /// Expert-parallel ranks: one directory for each
    ///
    /// Directories ep-0000-of-000N and so on hold the experts of one rank and all other tensors.
    #[arg(long, value_name = "N", value_parser = ranks())]
    pub ep_size: Option<u64>,
    /// With --ep-size: this rank's view alone, at the root
    #[arg(long, value_name = "R", requires = "ep_size")]
    pub ep_rank: Option<u64>,
    /// Ranks that share axis 1 of the grouped tensors; has to divide it
    #[arg(long, value_name = "N", value_parser = ranks(), requires = "ep_shard_rank")]
    pub ep_shard_size: Option<u64>,
    /// With --ep-shard-size: the rank whose part of axis 1 is shown
    #[arg(long, value_name = "R", requires = "ep_shard_size")]
    pub ep_shard_rank: Option<u64>,
    /// Keep only tensors whose name in the view matches; repeatable
    ///
    /// A regular expression, matched from the start of the name.
    #[arg(long, value_name = "RE", value_parser = parse_pattern)]
    pub include: Vec<Regex>,
    /// Leave out tensors whose name in the view matches; repeatable, beats --include
    ///
    /// A regular expression, matched from the start of the name.
    #[arg(long, value_name = "RE", value_parser = parse_pattern)]
    pub exclude: Vec<Regex>,
    /// Source tensors that no rule names
    #[arg(long, value_name = "A", value_parser = one_of(UNMAPPED), default_value = "refuse")]
    pub unmapped: Unmapped,
    /// Tensors and layers that the model needs and that may be missing; repeatable
    ///
    /// A regular expression, matched from the start of the name. The mount's summary names what is
    /// missing.
    #[arg(long, value_name = "RE", value_parser = parse_pattern)]
    pub allow_missing: Vec<Regex>,
    /// Largest synthetic shard; a larger tensor has one of its own
    #[arg(long, value_name = "SIZE", default_value_t = Size(5_000_000_000), value_parser = parse_shard_size)]
    pub shard_size: Size,
}

/// Options that say how the view is computed.
#[derive(Debug, Args)]
#[command(next_help_heading = "Resources")]
pub(super) struct EngineArgs {
    /// Memory for decoded chunks, those in flight included [default: 1GiB, or a quarter of memory]
    ///
    /// Serves requests smaller than a chunk and readers that bypass the page cache; what has been
    /// served is kept by the kernel's page cache, which this does not count. A quarter of it, at most
    /// 256 MiB, holds stored rows of matrices that are being transposed. The default is at most
    /// a quarter of the memory that the process may use (its control group's limit, or the
    /// machine's memory).
    #[arg(long, value_name = "SIZE")]
    pub cache_size: Option<Size>,
    /// Threads that answer requests [default: the cores this process may use]
    ///
    /// As many more read and decode ahead of readers that go forward.
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
}

/// Options that say how the kernel sees the mount.
#[derive(Debug, Args)]
#[command(next_help_heading = "Mount")]
pub(super) struct KernelArgs {
    /// Kernel read-ahead of the mount; needs root, else it is 128KiB
    ///
    /// Bytes that the kernel asks for ahead of a sequential reader, and the largest request of a
    /// memory map. More is faster for one reader of large files.
    #[arg(long, value_name = "SIZE", default_value_t = Size(4 << 20))]
    pub read_ahead: Size,
    /// Answer large reads past the page cache
    ///
    /// For readers with several threads that take each byte once, in large pieces and into memory that
    /// starts at a page; slow for small reads, and every reader computes anew.
    #[arg(long)]
    pub direct_io: bool,
    /// Let other users see the mount; without root, needs user_allow_other in /etc/fuse.conf
    #[arg(long)]
    pub allow_other: bool,
    /// Let root see a mount that another user made; needs the same as --allow-other
    #[arg(long)]
    pub allow_root: bool,
    /// Have fusermount3 unmount when the process dies, however it dies
    ///
    /// Implies --allow-root unless --allow-other is given, since fusermount3 asks for one of them.
    #[arg(long)]
    pub auto_unmount: bool,
    /// Owner of the files [default: who mounts]
    #[arg(long, value_name = "UID")]
    pub uid: Option<u32>,
    /// Group of the files [default: that of who mounts]
    #[arg(long, value_name = "GID")]
    pub gid: Option<u32>,
    /// Permission bits of the files, octal
    #[arg(long, value_name = "MODE", value_parser = parse_mode, default_value = "0444")]
    pub file_mode: u16,
    /// Permission bits of the directories, octal
    #[arg(long, value_name = "MODE", value_parser = parse_mode, default_value = "0555")]
    pub dir_mode: u16,
}

/// Options that say what is logged.
#[derive(Debug, Args)]
#[command(next_help_heading = "Log")]
pub(super) struct LogArgs {
    /// Least weight of a line in the log [default: info for a mount, else warn]
    #[arg(long, value_name = "LEVEL", value_parser = one_of(LOG_LEVELS))]
    pub log_level: Option<Level>,
    /// Append the log to this file [default: stderr in the foreground, else the journal]
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Form of a line in the log
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
    /// Machine-readable: the plan, as .mount-ckpt/plan.json has it
    #[arg(long)]
    pub json: bool,
    /// What the view is.
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
    /// Machine-readable result
    #[arg(long)]
    pub json: bool,
    /// What the view is.
    #[command(flatten)]
    pub view: ViewArgs,
    /// How it is computed.
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
    /// Directory to write: absent, empty, or left by an export with the same options
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// What the view is.
    #[command(flatten)]
    pub view: ViewArgs,
    /// How it is computed.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// What is logged.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Options of `status`.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Mount point; without it, every mount is listed
    #[arg(value_name = "MNT")]
    pub at: Option<PathBuf>,
    /// Machine-readable
    #[arg(long)]
    pub json: bool,
}

/// Options of `umount`.
#[derive(Debug, Args)]
pub(super) struct UmountArgs {
    /// Mount points
    #[arg(value_name = "MNT", required = true)]
    pub at: Vec<PathBuf>,
    /// Detach at once, even while in use; the process ends when the last file is closed
    #[arg(short = 'l', long)]
    pub lazy: bool,
    /// Say nothing, and exit with 0, where nothing is mounted
    #[arg(short = 'q', long)]
    pub quiet: bool,
}

/// Options of `models`.
#[derive(Debug, Args)]
pub(super) struct ModelsArgs {
    /// Machine-readable
    #[arg(long)]
    pub json: bool,
}

/// Options of `completions`.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// Shell to write for
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

/// Options of `man`.
#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// Write a page for each command into this directory instead
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// A number of ranks.
fn ranks() -> impl clap::builder::TypedValueParser<Value = u64> {
    value_parser!(u64).range(1..=u64::from(u32::MAX))
}

fn parse_shard_size(text: &str) -> Result<Size, String> {
    match text.parse() {
        Ok(Size(0)) => Err("expected at least 1 byte".to_owned()),
        size => size.map_err(|error| error.to_string()),
    }
}

/// A regular expression; what is wrong with it in one line.
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
