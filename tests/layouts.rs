//! Every shipped mapping with every layout: the tensors of a view, the detected layout of a
//! directory, and conversion there and back.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::write_checkpoint;
use common::{
    Tensor, Zeros, assert_same, engine, golden, tensors_of, tensors_of_dir, tensors_of_engine,
};
use mount_ckpt::{Checkpoint, LayoutName, Mapping, PlanOptions, models};

/// Golden folder and shipped mapping.
const CHECKPOINTS: [(&str, &str); 10] = [
    ("deepseek-v3", "deepseek-v3"),
    ("deepseek-v4-base", "deepseek-v4"),
    ("deepseek-v4-flash", "deepseek-v4"),
    ("glm4-moe", "glm4-moe"),
    ("gpt-oss", "gpt-oss"),
    ("kimi-k25-vl", "kimi-k25-vl"),
    ("mimo-v2-flash", "mimo-v2-flash"),
    ("minimax-m2", "minimax-m2"),
    ("qwen3-moe", "qwen3-moe"),
    ("qwen3-vl-moe", "qwen3-vl-moe"),
];

type Tensors = BTreeMap<String, Tensor>;
type Listing = BTreeMap<String, (String, Vec<usize>)>;

fn to(layout: LayoutName) -> PlanOptions {
    PlanOptions { to: Some(layout), ..PlanOptions::default() }
}

fn view(model: &str, dir: &Path, options: &PlanOptions) -> Tensors {
    tensors_of_engine(&engine(model, dir, options))
}

fn listing(tensors: &Tensors) -> Listing {
    tensors
        .iter()
        .map(|(n, (dtype, shape, _))| (n.clone(), (dtype.clone(), shape.clone())))
        .collect()
}

fn published(folder: &str) -> Tensors {
    tensors_of_dir(&golden(folder).join("checkpoint"))
}

fn config(folder: &str) -> String {
    std::fs::read_to_string(golden(folder).join("checkpoint/config.json")).unwrap()
}

/// A checkpoint directory with these tensors and the config.json of the published checkpoint.
fn directory(folder: &str, tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &config(folder), tensors);
    dir
}

/// Names, dtypes and shapes after decoding, derived from those of the published tensors only.
fn decoded(published: &Tensors) -> Listing {
    const PARTS: [&str; 5] = [".scale", "_scale_inv", "weight_scale", "_scales", "_shape"];
    let float = "BF16".to_owned();
    let matrix = |(name, (dtype, shape, _)): (&String, &Tensor)| {
        let mut shape = shape.clone();
        if PARTS.iter().any(|p| name.ends_with(p)) {
            return None;
        }
        if let Some(name) = name.strip_suffix("_packed") {
            shape[1] *= 8;
            return Some((name.to_owned(), (float.clone(), shape)));
        }
        if let Some(name) = name.strip_suffix("_blocks") {
            let [experts, out, groups, _] = shape[..] else { panic!("{name}: {shape:?}") };
            return Some((name.to_owned(), (float.clone(), vec![experts, groups * 32, out])));
        }
        let dtype = match dtype.as_str() {
            "F8_E4M3" => float.clone(),
            "I8" => {
                shape[1] *= 2;
                float.clone()
            }
            other => other.to_owned(),
        };
        Some((name.clone(), (dtype, shape)))
    };
    published.iter().filter_map(matrix).collect()
}

#[test]
fn every_mapping_has_a_golden_checkpoint() {
    let with_one = |name: &str| CHECKPOINTS.iter().any(|(_, model)| *model == name);
    let without: Vec<_> =
        models().into_iter().map(|m| m.name).filter(|name| !with_one(name)).collect();
    assert!(without.is_empty(), "{without:?}");
    for (folder, model) in CHECKPOINTS {
        let checkpoint = Checkpoint::open(&golden(folder).join("checkpoint")).unwrap();
        let types = checkpoint.config().model_types();
        assert_eq!(Mapping::for_model_types(&types).unwrap().list().name, model, "{folder}");
    }
}

#[test]
fn hf_view_of_a_published_checkpoint_is_its_decoded_tensors() {
    for (folder, model) in CHECKPOINTS {
        let dir = golden(folder).join("checkpoint");
        let got = listing(&view(model, &dir, &to(LayoutName::Hf)));
        assert_eq!(got, decoded(&published(folder)), "{folder}");
    }
}

#[test]
fn a_native_checkpoint_is_detected_and_converts_to_hf() {
    for (folder, model) in CHECKPOINTS {
        let hf = view(model, &golden(folder).join("checkpoint"), &to(LayoutName::Hf));
        let dir = directory(folder, &tensors_of(&golden(folder).join("native.safetensors")));
        let engine = engine(model, dir.path(), &PlanOptions::default());
        let summary = &engine.plan().summary;
        assert_eq!((summary.from, summary.to), (LayoutName::Native, LayoutName::Hf), "{folder}");
        let back = tensors_of_engine(&engine);
        if model == "kimi-k25-vl" {
            // Its native layout casts F32 to BF16.
            let shapes =
                |t: &Tensors| listing(t).into_iter().map(|(n, (_, s))| (n, s)).collect::<Vec<_>>();
            assert_eq!(shapes(&back), shapes(&hf));
        } else {
            // The reference's FP4 table has +0.0 for code 8.
            assert_same(&back, &hf, Zeros::Equal);
        }
    }
}

#[test]
fn a_transformers_checkpoint_is_detected_and_converts_to_hf() {
    for (folder, model) in CHECKPOINTS {
        let source = golden(folder).join("checkpoint");
        let mut hf = view(model, &source, &to(LayoutName::Hf));
        let transformers = view(model, &source, &to(LayoutName::Transformers));
        let dir = directory(folder, &transformers);
        let engine = engine(model, dir.path(), &to(LayoutName::Hf));
        // For gpt-oss, the published BF16 layout and the in-memory layout of transformers are the
        // same.
        let expected = if model == "gpt-oss" { LayoutName::Hf } else { LayoutName::Transformers };
        assert_eq!(engine.plan().summary.from, expected, "{folder}");
        let back = tensors_of_engine(&engine);
        // Tensors without a place in transformers, such as MTP layers, are dropped.
        hf.retain(|name, _| back.contains_key(name));
        assert_same(&back, &hf, Zeros::Signed);
        let dropped = decoded(&published(folder)).len() - back.len();
        let mtp = ["deepseek-v3", "deepseek-v4", "glm4-moe", "mimo-v2-flash"].contains(&model);
        assert_eq!(dropped > 0, mtp, "{folder}: {dropped} tensors dropped");
    }
}

#[test]
fn native_and_published_checkpoints_give_the_same_transformers_view() {
    for (folder, model) in CHECKPOINTS {
        let source = golden(folder).join("checkpoint");
        let expected = view(model, &source, &to(LayoutName::Transformers));
        let dir = directory(folder, &tensors_of(&golden(folder).join("native.safetensors")));
        let got = view(model, dir.path(), &to(LayoutName::Transformers));
        if model == "kimi-k25-vl" {
            assert_eq!(
                got.keys().collect::<Vec<_>>(),
                expected.keys().collect::<Vec<_>>(),
                "{folder}"
            );
        } else {
            assert_same(&got, &expected, Zeros::Equal);
        }
    }
}
