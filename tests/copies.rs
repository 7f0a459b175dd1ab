//! Which shard provides a tensor that is stored more than once, and which shards belong to a
//! checkpoint.

mod common;

use std::fs;
use std::path::Path;

use common::toy::{Toy, shard_name};
use common::{exported, tensors_of_dir};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const INDEX: &str = "model.safetensors.index.json";
const OVERLAY: &str = "model-overlay-00001-of-00001.safetensors";

fn written(toy: &Toy) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    toy.write(dir.path());
    dir
}

fn index(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join(INDEX)).unwrap()).unwrap()
}

fn set_index(dir: &Path, index: &Value) {
    fs::write(dir.join(INDEX), index.to_string()).unwrap();
}

/// Writes another shard with newer copies of some tensors, and makes the index point to them. The
/// old copies remain in their shards.
fn overlay(dir: &Path, tensors: &[(&str, Dtype, &[usize], &[u8])]) {
    let view =
        |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
    let views =
        tensors.iter().map(|(name, dtype, shape, bytes)| (*name, view(*dtype, shape, bytes)));
    fs::write(dir.join(OVERLAY), safetensors::serialize(views, None).unwrap()).unwrap();
    let mut index = index(dir);
    for (name, ..) in tensors {
        index["weight_map"][*name] = OVERLAY.into();
    }
    set_index(dir, &index);
}

/// Regression: such a checkpoint was refused because the tensor is in two shards.
#[test]
fn the_index_decides_which_copy_of_a_tensor_is_read() {
    let toy = Toy::golden("mimo-v2-flash");
    let norm = "model.norm.weight";
    let expert = "model.layers.1.mlp.experts.1.up_proj.weight";
    let scale = format!("{expert}_scale_inv");
    let (old, old_scale) = (&toy.tensors[expert], &toy.tensors[&*scale]);
    // 1.0 is 0x38 in FP8 and 0x3F80 in BF16; every block has the scale 0.5.
    let ones = vec![0x38; old.bytes.len()];
    let halves = 0.5f32.to_le_bytes().repeat(old_scale.bytes.len() / 4);
    let threes = [0x40, 0x40].repeat(136);
    let dir = written(&toy);
    overlay(
        dir.path(),
        &[
            (norm, Dtype::BF16, &[136], &threes),
            (expert, old.dtype, &old.shape, &ones),
            (&scale, old_scale.dtype, &old_scale.shape, &halves),
        ],
    );
    let view = exported(dir.path(), &["--to", "hf"]).unwrap();
    let view = tensors_of_dir(view.path());
    assert_eq!(view[norm].2, threes);
    assert_eq!(view[expert].2, [0x00, 0x3F].repeat(ones.len()));
    // `--scales-from` uses the index, too.
    let dir = dir.path().to_str().unwrap();
    let options = ["--to", "hf", "--quantize", "checkpoint", "--scales-from", dir];
    let view = exported(Path::new(dir), &options).unwrap();
    let view = tensors_of_dir(view.path());
    assert_eq!((&view[expert].2, &view[&scale].2), (&ones, &halves));
}

/// Regression: tensors that the index does not list were served.
#[test]
fn a_tensor_that_the_index_does_not_list_is_ignored() {
    let mut toy = Toy::golden("qwen3-moe");
    toy.add("lm_head.bias", Dtype::BF16, &[40]);
    let dir = written(&toy);
    let mut listed = index(dir.path());
    let map = listed["weight_map"].as_object_mut().unwrap();
    map.remove("lm_head.bias").unwrap();
    set_index(dir.path(), &listed);
    let view = exported(dir.path(), &["--to", "hf"]).unwrap();
    assert!(!tensors_of_dir(view.path()).contains_key("lm_head.bias"));

    let map = listed["weight_map"].as_object_mut().unwrap();
    map.remove("model.norm.weight").unwrap();
    set_index(dir.path(), &listed);
    let message = exported(dir.path(), &["--to", "hf"]).unwrap_err();
    let why = "1 missing tensor that the model needs: \
               `model.norm.weight`";
    assert!(message.contains(why), "{message}");
}

/// Regression: the message advised to complete the download, although all shards existed under
/// other names.
#[test]
fn an_index_that_names_other_shards_is_reported_as_out_of_date() {
    let dir = written(&Toy::golden("qwen3-moe"));
    let mut stale = index(dir.path());
    for file in stale["weight_map"].as_object_mut().unwrap().values_mut() {
        *file = file.as_str().unwrap().replace("of-00003", "of-00004").into();
    }
    set_index(dir.path(), &stale);
    let message = exported(dir.path(), &[]).unwrap_err();
    assert!(message.contains("the index is out of date"), "{message}");
    assert!(message.contains(&shard_name(0)), "{message}");
    assert!(!message.contains("complete the download"), "{message}");

    fs::remove_file(dir.path().join(shard_name(1))).unwrap();
    let message = exported(dir.path(), &[]).unwrap_err();
    assert!(message.contains("complete the download"), "{message}");
}

/// safetensors accepts `"__metadata__": null`.
#[test]
fn null_metadata_is_accepted() {
    let dir = written(&Toy::golden("qwen3-moe"));
    for shard in 0..3 {
        let path = dir.path().join(shard_name(shard));
        let bytes = fs::read(&path).unwrap();
        let (length, rest) = bytes.split_at(8);
        let length = usize::try_from(u64::from_le_bytes(length.try_into().unwrap())).unwrap();
        let (header, data) = rest.split_at(length);
        let mut header: Value = serde_json::from_slice(header).unwrap();
        header["__metadata__"] = json!(null);
        let header = header.to_string();
        let length = u64::try_from(header.len()).unwrap().to_le_bytes();
        fs::write(&path, [&length, header.as_bytes(), data].concat()).unwrap();
    }
    let view = exported(dir.path(), &["--to", "hf"]).unwrap();
    let plain = exported(written(&Toy::golden("qwen3-moe")).path(), &["--to", "hf"]).unwrap();
    assert!(tensors_of_dir(view.path()) == tensors_of_dir(plain.path()));
}
