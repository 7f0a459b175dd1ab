//! From a checkpoint's name to its view: the one place where the command line meets the rooms that
//! do the work.

use super::choices::{FloatChoice, KvScalesChoice, LayoutChoice, ScaleFloatChoice, UnmappedChoice};
use super::request::{EngineOptions, KernelOptions, MappingChoice, PlanOptions, Quantize};
use crate::fuse::MountOptions;
use crate::mapping::{self, LayoutName, Mapping, ModelName};
use crate::plan::{self, ExpertParallel, ExpertShard, Plan, ScaleReading, TensorId, Unmapped};
use crate::read::{self, Engine};
use crate::source::{self, Checkpoint};
use crate::tensor::Float;
use crate::view::{Ino, Kind, View, ViewOptions};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A checkpoint and the plan of its view: everything that a mount checks has been checked.
#[derive(Debug)]
pub struct Planned {
    /// The checkpoint.
    pub checkpoint: Arc<Checkpoint>,
    /// What the view is.
    pub plan: Arc<Plan>,
}

/// The checkpoint directory that `src` names, absolute and without symlinks in it.
///
/// # Errors
/// Where there is none.
pub fn locate(src: &Path) -> anyhow::Result<PathBuf> {
    // A name of the hub is UTF-8; a path need not be.
    let found = match src.to_str() {
        Some(name) => source::resolve(name)?,
        None => src.to_owned(),
    };
    found.canonicalize().with_context(|| format!("cannot look at `{}`", found.display()))
}

/// Opens the checkpoint in `source` and plans its view.
///
/// # Errors
/// Where the checkpoint is damaged, or no such view of it can be.
pub fn plan(source: &Path, options: &PlanOptions) -> anyhow::Result<Planned> {
    let checkpoint = Arc::new(Checkpoint::open(source)?);
    let config = checkpoint.config();
    let mapping = match &options.mapping {
        MappingChoice::Auto => {
            let types: Vec<String> =
                config.model_types().into_iter().map(ToOwned::to_owned).collect();
            Mapping::for_model_types(&types)?
        }
        MappingChoice::Named(name) => Mapping::named(name)?,
        MappingChoice::File(file) => Mapping::load(file)?,
    };
    let mapping = mapping.resolve(&|key| config.get(key).cloned())?;
    let plan = Arc::new(Plan::build(&checkpoint, &mapping, &plan_options(options)?)?);
    Ok(Planned { checkpoint, plan })
}

fn plan_options(options: &PlanOptions) -> anyhow::Result<plan::PlanOptions> {
    let quantize = options.quantize.as_ref().map(quantize).transpose()?;
    Ok(plan::PlanOptions {
        to: options.to.map(|to| match to {
            LayoutChoice::Native => LayoutName::Native,
            LayoutChoice::Transformers => LayoutName::Transformers,
            LayoutChoice::Hf => LayoutName::Hf,
        }),
        dtype: match options.dtype {
            FloatChoice::Bf16 => Float::BF16,
            FloatChoice::F16 => Float::F16,
            FloatChoice::F32 => Float::F32,
        },
        scale_reading: match options.kv_scales {
            KvScalesChoice::Fused => ScaleReading::Fused,
            KvScalesChoice::Automodel => ScaleReading::Automodel,
        },
        unmapped: match options.unmapped {
            UnmappedChoice::Refuse => Unmapped::Refuse,
            UnmappedChoice::Keep => Unmapped::Keep,
            UnmappedChoice::Drop => Unmapped::Drop,
        },
        allow_missing: options.allow_missing.clone(),
        include: options.include.clone(),
        exclude: options.exclude.clone(),
        expert_parallel: options.expert_parallel.map(|ranks| ExpertParallel {
            size: ranks.size.into(),
            rank: ranks.rank.map(u64::from),
        }),
        expert_shard: options
            .expert_shard
            .map(|shard| ExpertShard { size: shard.size.into(), rank: shard.rank.into() }),
        quantize,
    })
}

fn quantize(options: &Quantize) -> anyhow::Result<plan::Quantize> {
    let original = options.scales_from.as_deref().map(|src| {
        let opened = locate(src).and_then(|dir| Ok(Checkpoint::open(&dir)?));
        opened.with_context(|| format!("--scales-from `{}`", src.display()))
    });
    let scale_dtype = match options.scale_dtype {
        ScaleFloatChoice::Bf16 => Float::BF16,
        ScaleFloatChoice::F16 => Float::F16,
    };
    Ok(plan::Quantize {
        original: original.transpose()?.map(Arc::new),
        scale_dtype: Some(scale_dtype),
    })
}

/// Opens the checkpoint that `src` names, as [`plan()`] does.
///
/// # Errors
/// As [`plan()`], and where there is no such checkpoint.
pub fn locate_and_plan(src: &Path, options: &PlanOptions) -> anyhow::Result<Planned> {
    plan(&locate(src)?, options)
}

impl Planned {
    /// What computes the view; `direct_io` where its readers bypass the kernel's page cache.
    pub fn engine(
        self,
        options: &EngineOptions,
        direct_io: bool,
    ) -> (Arc<Engine>, Arc<Checkpoint>) {
        let options = read::EngineOptions {
            cache_bytes: options.cache_size,
            keep_given: direct_io,
            threads: options.threads,
        };
        let engine = Engine::new(self.checkpoint.clone(), self.plan, options);
        (Arc::new(engine), self.checkpoint)
    }
}

/// The files of a view, as they are mounted.
///
/// # Errors
/// Where they cannot be laid out.
pub fn view(
    (engine, checkpoint): (Arc<Engine>, Arc<Checkpoint>),
    plan: &PlanOptions,
    owner: &Owner,
) -> anyhow::Result<Arc<View>> {
    let options = ViewOptions {
        shard_size: plan.shard_size,
        uid: owner.uid,
        gid: owner.gid,
        file_mode: owner.file_mode,
        dir_mode: owner.dir_mode,
    };
    Ok(Arc::new(View::build(engine, checkpoint, &options)?))
}

/// Whose the files of a view are.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits of the files.
    pub file_mode: u16,
    /// Permission bits of the directories.
    pub dir_mode: u16,
}

/// What the kernel is told at the mount of a view of `source`.
pub fn mount_options(
    source: &Path,
    kernel: &KernelOptions,
    engine: &EngineOptions,
) -> MountOptions {
    let source = || source.to_string_lossy().into_owned();
    MountOptions {
        threads: engine.threads,
        read_ahead: kernel.read_ahead,
        direct_io: kernel.direct_io,
        acl: kernel.acl,
        fs_name: kernel.fs_name.clone().unwrap_or_else(source),
        extra: kernel.extra.clone(),
    }
}

/// A tensor of a view, to be read.
#[derive(Clone, Debug)]
pub struct ViewTensor {
    /// What the engine calls it.
    pub id: TensorId,
    /// Its name in the view.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Every tensor of a view.
pub fn tensors(engine: &Engine) -> Vec<ViewTensor> {
    let tensors = engine.plan().tensors.iter().zip(0..);
    tensors
        .map(|(tensor, id)| ViewTensor {
            id: TensorId(id),
            name: tensor.name.to_string(),
            bytes: tensor.bytes(),
        })
        .collect()
}

/// Fills `out` with the bytes of a tensor from `at` on.
///
/// # Errors
/// Where the source cannot be read or does not decode.
pub fn read_tensor(
    engine: &Engine,
    tensor: &ViewTensor,
    at: u64,
    out: &mut [u8],
) -> anyhow::Result<()> {
    engine.read(tensor.id, at, out).with_context(|| format!("tensor `{}`", tensor.name))
}

/// A file of a view, to be copied.
#[derive(Clone, Debug)]
pub struct ViewFile {
    /// Path below the root of the view.
    pub path: PathBuf,
    /// Its inode.
    pub ino: Ino,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Directory of what is about the mount and not of the checkpoint.
const STATUS_DIRECTORY: &str = ".mount-ckpt";

/// Every file of a view but those about the mount itself, directory after directory.
///
/// # Errors
/// Where the view contradicts itself.
pub fn files(view: &View) -> anyhow::Result<Vec<ViewFile>> {
    let mut files = Vec::new();
    let mut directories = vec![(PathBuf::new(), Ino::ROOT)];
    while let Some((path, ino)) = directories.pop() {
        // The first two entries are the directory itself and the one above it.
        for n in 2.. {
            let Some(entry) = view.entry(ino, n)? else { break };
            if path.as_os_str().is_empty() && entry.name == STATUS_DIRECTORY {
                continue;
            }
            let path = path.join(&*entry.name);
            match entry.kind {
                Kind::Directory => directories.push((path, entry.ino)),
                Kind::File => {
                    let bytes = view.attr(entry.ino)?.size;
                    files.push(ViewFile { path, ino: entry.ino, bytes });
                }
            }
        }
    }
    Ok(files)
}

/// Fills `out` with the bytes of a file from `at` on.
///
/// # Errors
/// Where the source cannot be read, does not decode, or is shorter than it was.
pub fn read_file(
    view: &View,
    file: &ViewFile,
    mut at: u64,
    mut out: &mut [u8],
) -> anyhow::Result<()> {
    while !out.is_empty() {
        let shown = || format!("`{}` of the view", file.path.display());
        let read = view.read(file.ino, at, out).with_context(shown)?;
        anyhow::ensure!(read > 0, "{}: expected {} more bytes, got none", shown(), out.len());
        out = &mut out[read..];
        at += u64::try_from(read).expect("a read is below 2^64 bytes");
    }
    Ok(())
}

/// The built-in mappings.
pub fn models() -> Vec<ModelName> {
    mapping::shipped()
}
