//! Mounts a Hugging Face checkpoint directory in another tensor layout: safetensors files whose bytes are
//! computed when they are read.
//!
//! The command `mount-ckpt` is built on this crate. Use the crate to read single tensors of a view
//! without a mount, or to mount from a Rust program.
//!
//! # Example
//!
//! A published FP8 checkpoint with one tensor for each expert, read as BF16 with all experts of a layer in one
//! tensor:
//!
//! ```
//! use mount_ckpt::{Checkpoint, Engine, EngineOptions, Mapping, Plan, PlanOptions};
//! use std::sync::Arc;
//!
//! # let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/minimax-m2/checkpoint");
//! // Reads config.json, the index and the header of every shard. No tensor is read.
//! let checkpoint = Arc::new(Checkpoint::open(directory.as_ref())?);
//! // The mapping for `model_type` of config.json.
//! let mapping = Mapping::for_model_types(&checkpoint.config().model_types())?;
//! // Where the bytes of each tensor come from. Everything that can be refused is refused here.
//! let plan = Arc::new(Plan::build(&checkpoint, &mapping, &PlanOptions::default())?);
//! let engine = Engine::new(checkpoint, plan, EngineOptions::default());
//!
//! let name = "model.layers.0.mlp.experts.gate_and_up_projs";
//! let id = engine.plan().find(name).expect("layer 0 has experts");
//! let tensor = engine.plan().tensor(id);
//! // [experts, hidden, 2 * intermediate]
//! assert_eq!((tensor.dtype.name(), tensor.shape.dims()), ("BF16", &[3, 136, 272][..]));
//! // The first row of expert 2.
//! let row_bytes = 272 * 2;
//! let mut row = vec![0; row_bytes];
//! engine.read(id, 2 * 136 * row_bytes as u64, &mut row)?;
//! # assert!(row.iter().any(|byte| *byte != 0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The same engine, mounted (needs `/dev/fuse`):
//!
//! ```no_run
//! # use mount_ckpt::Engine;
//! use mount_ckpt::{MountOptions, View, ViewOptions, mount};
//! use std::sync::Arc;
//!
//! # fn mounted(engine: Engine) -> Result<(), Box<dyn std::error::Error>> {
//! let view = Arc::new(View::new(Arc::new(engine), &ViewOptions::default())?);
//! let mounted = mount(view, "/mnt/mimo".as_ref(), &MountOptions::default())?;
//! // Returns when somebody unmounts it. Dropping `mounted` unmounts it too.
//! mounted.wait()?;
//! # Ok(())
//! # }
//! ```
//!
//! # The path of a byte
//!
//! Each module imports only modules to its left, and has a page that says how it works:
//!
//! ```text
//! tensor ─ codec ─ source ─ mapping ─ plan ─ read ─ view ─ mount ─ cli
//! ```
//!
//! - `tensor`: dtypes, shapes, and affine copies between N-dimensional boxes.
//! - `codec`: decodes and encodes FP8, FP4, INT4 and MXFP4; casts and transposes; SIMD kernels.
//! - `source`: opens and checks a [`Checkpoint`]: config.json, the index, the header of every shard.
//! - `mapping`: what the tensors of a model are called in each layout, and what connects them: a [`Mapping`] is a
//!   TOML file.
//! - `plan`: the [`Plan`] says for every tensor of the view which bytes of the source it is made of, and how.
//! - `read`: the [`Engine`] carries out the plan for any byte range: decode, LRU cache, prefetch.
//! - `view`: the [`View`] lays the tensors out in files: shards, index, config.json, status files.
//! - `mount`: answers the kernel's FUSE requests from a view, and takes care of the life of a mount.
//! - `cli`: the command line.
//!
//! When a program reads a mounted shard, the kernel sends a FUSE request to `mount`. `view` finds the tensors that the
//! byte range covers. For each, `read` looks into the plan: bytes that the source has as they are wanted are
//! copied (or spliced) from the shard. All others are decoded, in chunks that are cached or directly into the
//! reply.
//!
//! # Glossary
//!
//! - **Shard**: one safetensors file of a checkpoint. A view has synthetic shards.
//! - **Layout**: names and grouping of a model's tensors: `hf` (as published), `native` (NeMo Automodel), `transformers`.
//! - **Payload, scale, block**: a quantized matrix is stored as codes (the payload) and scales; each scale serves a
//!   block of rows and columns. A decoded element is `round(f32(code) * f32(scale))`.
//! - **Logical matrix**: a decoded matrix under its published name, whatever it is stored as.
//! - **Fragment**: an affine copy between a box of a tensor of the view and a box of one logical matrix.
//! - **Verbatim**: bytes of the source that the view shows unchanged.
//! - **Plane**: the last two axes of a tensor, such as one expert of a stack.
//! - **Chunk**: whole rows of a computed tensor, about 1 MiB: the unit of decoding and caching.
//! - **The way back**: from a layout of training to the published names, optionally quantized.

#![deny(unsafe_code)]
#![warn(missing_docs, unreachable_pub)]

mod cli;
mod codec;
mod mapping;
mod mount;
mod plan;
mod read;
mod source;
mod tensor;
mod view;

pub use cli::main as run_command;
pub use mapping::{LayoutName, Mapping, MappingError, ModelName, shipped as models};
pub use mount::{MountError, MountOptions, Mounted, mount};
pub use plan::{
    Directory, ExpertParallel, ExpertShard, Plan, PlanError, PlanOptions, Quantize, ScaleReading,
    Summary, TensorId, TensorPlan, Unmapped,
};
pub use read::{CounterSnapshot, Engine, EngineOptions, ReadError};
pub use source::{Checkpoint, Config, ConfigError, SourceError, SourceTensor, resolve as locate};
pub use tensor::{DType, Float, Shape};
pub use view::{Attr, DirEntry, Ino, Kind, View, ViewError, ViewOptions};

/// What the benchmarks need of the inside. Not part of the interface.
#[doc(hidden)]
pub mod bench {
    pub use crate::codec::{
        Code, Level, Orientation, Scales, Tile, copy2d_at, decode_at, encode_at, reference,
    };
    pub use crate::mount::{Filesystem, Mountable, mount_filesystem};
    pub use crate::read::Buffer;
}
