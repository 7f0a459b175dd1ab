//! Tensors in pieces: each process of a training run saved its part to its own shard.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use common::{
    Tensor, Zeros, assert_same, dtype_of, golden, tensors_of, tensors_of_dir, tensors_of_engine,
};
use mount_ckpt::{LayoutName, PlanOptions};
use safetensors::tensor::TensorView;

type Tensors = BTreeMap<String, Tensor>;

/// Writes a shard as torch.distributed.checkpoint does. The third element of a tensor is its first
/// row within the whole tensor.
fn write_shard(dir: &Path, rank: usize, tensors: &[(String, Tensor, usize)]) {
    let offsets = tensors.iter().map(|(name, (_, shape, _), row)| {
        let offsets: Vec<usize> =
            (0..shape.len()).map(|axis| if axis == 0 { *row } else { 0 }).collect();
        (name.clone(), serde_json::json!({ "saved_offsets": offsets }))
    });
    let offsets: serde_json::Map<_, _> = offsets.collect();
    let sharding = serde_json::Value::Object(offsets).to_string();
    let metadata = HashMap::from([("DCP_SHARDING_INFO".to_owned(), sharding)]);
    let views = tensors.iter().map(|(name, (dtype, shape, bytes), _)| {
        (name, TensorView::new(dtype_of(dtype), shape.clone(), bytes).unwrap())
    });
    let path = dir.join(format!("shard-{rank:05}-model-00001-of-00001.safetensors"));
    safetensors::serialize_to_file(views, Some(metadata), &path).unwrap();
}

/// A save by two processes. Each stores half of the rows of the tensors for which `cut` returns
/// true.
fn saved(model: &str, tensors: &Tensors, cut: impl Fn(&Tensor) -> bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let metadata = dir.path().join(".hf_metadata");
    std::fs::create_dir(&metadata).unwrap();
    let config = golden(model).join("checkpoint/config.json");
    std::fs::copy(config, metadata.join("config.json")).unwrap();
    let mut ranks = [Vec::new(), Vec::new()];
    for (name, tensor) in tensors {
        let (dtype, shape, bytes) = tensor;
        if !cut(tensor) || shape[0] < 2 {
            ranks[0].push((name.clone(), tensor.clone(), 0));
            continue;
        }
        let rows = shape[0] / 2;
        let (first, second) = bytes.split_at(bytes.len() / shape[0] * rows);
        let part = |n: usize, bytes: &[u8]| {
            let shape = [&[n], &shape[1..]].concat();
            (dtype.clone(), shape, bytes.to_vec())
        };
        ranks[0].push((name.clone(), part(rows, first), 0));
        ranks[1].push((name.clone(), part(shape[0] - rows, second), rows));
    }
    for (rank, tensors) in ranks.iter().enumerate() {
        write_shard(dir.path(), rank + 1, tensors);
    }
    dir
}

fn back() -> PlanOptions {
    PlanOptions { to: Some(LayoutName::Hf), ..PlanOptions::default() }
}

#[test]
fn pieces_of_several_ranks_join_to_the_whole_tensor() {
    let whole = tensors_of(&golden("qwen3-moe").join("native.safetensors"));
    let cut = saved("qwen3-moe", &whole, |_| true);
    let uncut = saved("qwen3-moe", &whole, |_| false);
    let view = |dir: &tempfile::TempDir| {
        tensors_of_engine(&common::engine("qwen3-moe", dir.path(), &back()))
    };
    assert_same(&view(&cut), &view(&uncut), Zeros::Signed);
}

/// The shards do not state the number of processes.
#[test]
fn a_missing_shard_of_a_rank_is_refused() {
    let whole = tensors_of(&golden("qwen3-moe").join("native.safetensors"));
    let refused = |rank: usize| {
        let dir = saved("qwen3-moe", &whole, |_| true);
        let shard = format!("shard-{rank:05}-model-00001-of-00001.safetensors");
        std::fs::remove_file(dir.path().join(shard)).unwrap();
        common::plan("qwen3-moe", dir.path(), &back()).unwrap_err().to_string()
    };
    let message = refused(1);
    assert!(message.contains("that leave gaps or overlap"), "{message}");
    let message = refused(2);
    let expected = "`model.norm.weight` (expected [64], got [32]: is a process's shard missing?)";
    assert!(message.contains(expected), "{message}");
}

/// Codes and scales are split at rows that do not match.
#[test]
fn pieces_of_a_quantized_matrix_are_refused() {
    let tensors = tensors_of_dir(&golden("minimax-m2").join("checkpoint"));
    let dir = saved("minimax-m2", &tensors, |(dtype, ..)| dtype == "F8_E4M3");
    let message = common::plan("minimax-m2", dir.path(), &back()).unwrap_err().to_string();
    assert!(message.contains("(pieces of a quantized matrix)"), "{message}");
}
