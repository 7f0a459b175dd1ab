//! Mounts a Hugging Face checkpoint directory and shows it in another layout.

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
