//! A small view for tests: a checkpoint in a temporary directory, all of whose tensors are
//! verbatim.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::mapping::LayoutName;
use crate::plan::{
    Body, ConfigEntries, Directory, Matrix, Origin, Plan, SourceRange, Summary, TensorId,
    TensorPlan,
};
use crate::read::{Engine, EngineOptions};
use crate::source::testing::Dir;
use crate::source::{Checkpoint, SourceId, SourceTensor};
use crate::tensor::{DType, Float, Shape};

use super::{View, ViewOptions};

/// Name, dtype and shape of the source's tensors, in the order of their bytes in the shard. The
/// plan sorts them by name.
pub(crate) const TENSORS: [(&str, DType, &[u64]); 7] = [
    ("norm", DType::F32, &[7]),
    ("experts.gate_and_up_projs", DType::BF16, &[3, 500, 700]),
    ("ids/odd", DType::I64, &[5]),
    ("empty", DType::BF16, &[0, 4]),
    ("lm_head", DType::BF16, &[1000, 1000]),
    ("bytes", DType::U8, &[3]),
    ("z.last", DType::U8, &[100_000]),
];

/// The bytes of the tensor with this name.
pub(crate) fn bytes_of(name: &str) -> Vec<u8> {
    let found = TENSORS.iter().zip(1u8..).find(|((n, ..), _)| *n == name);
    let ((_, dtype, dims), seed) = found.expect("a tensor of the table");
    let n = Shape::new(*dims).bytes(*dtype).expect("small");
    (0..n).map(|at| (at.wrapping_mul(31) >> 3).to_le_bytes()[0].wrapping_add(seed)).collect()
}

/// A checkpoint with one shard, a `quantization_config` that a view removes, and other files.
pub(crate) fn source() -> Dir {
    let tensors: Vec<_> = TENSORS.iter().map(|&(n, d, dims)| (n, d, dims, bytes_of(n))).collect();
    Dir::new()
        .file("config.json", r#"{"model_type":"toy","quantization_config":{"bits":8},"z":0.1}"#)
        .shard("model.safetensors", &tensors)
        .file("tokenizer.json", "{\"tokens\": 3}\n")
        .file("sub/code.py", "pass\n")
}

/// A view with all tensors at the root, and the first three of the plan in `ep-0000-of-0001`.
pub(crate) fn view(source: &Dir) -> View {
    let checkpoint = Arc::new(Checkpoint::open(source.path()).expect("a checkpoint"));
    let options = ViewOptions { shard_size: 3_000_000, ..ViewOptions::default() };
    let engine = Engine::new(
        Arc::clone(&checkpoint),
        Arc::new(plan(&checkpoint)),
        EngineOptions { cache_bytes: 1 << 20, direct_io: false, threads: 2 },
    );
    View::new(Arc::new(engine), &options).map_err(|e| e.to_string()).expect("a view")
}

fn plan(checkpoint: &Checkpoint) -> Plan {
    let verbatim = |(source, tensor): (_, &SourceTensor)| TensorPlan {
        name: tensor.name.clone(),
        dtype: tensor.dtype,
        shape: tensor.shape.clone(),
        body: Body::Verbatim(vec![SourceRange {
            at: 0,
            bytes: tensor.bytes,
            origin: Origin::Source,
            source,
            offset: 0,
        }]),
    };
    let matrix = |(id, tensor): (_, &SourceTensor)| {
        Matrix::plain(tensor.name.clone(), id, tensor.dtype, tensor.shape.clone())
    };
    let directory = |name: &str, ids: std::ops::Range<u32>| Directory {
        name: name.to_owned(),
        tensors: ids.map(TensorId).collect(),
    };
    let tensors = || (0..).map(SourceId).zip(checkpoint.tensors());
    Plan {
        tensors: tensors().map(verbatim).collect(),
        matrices: tensors().map(matrix).collect(),
        directories: vec![directory("", 0..7), directory("ep-0000-of-0001", 0..3)],
        quantized: Vec::new(),
        original: None,
        config_entries: ConfigEntries::default(),
        summary: Summary {
            model: "toy".to_owned(),
            from: LayoutName::Hf,
            to: LayoutName::Native,
            dtype: Float::BF16,
            source: (7, 0),
            view: (7, 0),
            verbatim: (7, 0),
            ranks: 1,
            fused_scales: None,
            encoded: Default::default(),
            dropped: BTreeMap::new(),
            unmapped: None,
            allowed_missing: Vec::new(),
            absent_layers: Default::default(),
        },
    }
}
