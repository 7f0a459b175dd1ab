//! The way back: from grouped layouts to the published one, plain and quantized.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use common::{Tensor, Zeros, assert_same, engine, golden, tensors_of, tensors_of_engine};
use mount_ckpt::mapping::LayoutName;
use mount_ckpt::plan::{PlanOptions, Quantize};
use mount_ckpt::source::Checkpoint;

/// Writes tensors as a checkpoint of one file.
fn write(dir: &Path, config: &[u8], tensors: &BTreeMap<String, Tensor>) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config).unwrap();
    let views: BTreeMap<&str, safetensors::tensor::TensorView<'_>> = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| {
            let dtype = common::dtype_of(dtype);
            let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap();
            (name.as_str(), view)
        })
        .collect();
    safetensors::serialize_to_file(&views, None, &dir.join("model.safetensors")).unwrap();
}

fn to(layout: LayoutName) -> PlanOptions {
    PlanOptions { to: Some(layout), ..PlanOptions::default() }
}

const FAMILIES: [(&str, &str); 5] = [
    ("mimo-v2-flash", "mimo-v2-flash"),
    ("deepseek-v4-flash", "deepseek-v4"),
    ("deepseek-v4-base", "deepseek-v4"),
    ("kimi-k25-vl", "kimi-k25-vl"),
    ("qwen3-vl-moe", "qwen3-vl-moe"),
];

/// The checkpoint of a family, and its native and transformers views written to `dir`.
fn layouts(folder: &str, model: &str, dir: &Path) {
    let checkpoint = golden(folder).join("checkpoint");
    let config = std::fs::read(checkpoint.join("config.json")).unwrap();
    for layout in [LayoutName::Native, LayoutName::Transformers] {
        let view = tensors_of_engine(&engine(model, &checkpoint, &to(layout)));
        write(&dir.join(layout.as_str()), &config, &view);
    }
}

#[test]
fn any_layout_gives_any_layout() {
    for (folder, model) in FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        layouts(folder, model, dir.path());
        let checkpoint = golden(folder).join("checkpoint");
        // Transformers drops MTP: what comes from there is compared where it is there.
        let hf = tensors_of_engine(&engine(model, &checkpoint, &to(LayoutName::Hf)));
        for from in [LayoutName::Native, LayoutName::Transformers] {
            let source = dir.path().join(from.as_str());
            for target in [LayoutName::Hf, LayoutName::Native, LayoutName::Transformers] {
                let engine = engine(model, &source, &to(target));
                assert_eq!(engine.plan().summary.from, from, "{folder}");
                let got = tensors_of_engine(&engine);
                let expected = match target {
                    LayoutName::Hf => hf.clone(),
                    LayoutName::Native | LayoutName::Transformers => {
                        tensors_of(&dir.path().join(target.as_str()).join("model.safetensors"))
                    }
                };
                let expected: BTreeMap<String, Tensor> = if from == LayoutName::Transformers {
                    expected.into_iter().filter(|(name, _)| got.contains_key(name)).collect()
                } else {
                    expected
                };
                assert!(got.len() > 10, "{folder}: {from} -> {target}");
                println!("{folder}: {from} -> {target}: {} tensors", got.len());
                assert_same_numbers(&got, &expected);
            }
        }
    }
}

/// As [`assert_same`]; where a layout casts every float, the other's F32 is cast before.
fn assert_same_numbers(got: &BTreeMap<String, Tensor>, expected: &BTreeMap<String, Tensor>) {
    let mut expected = expected.clone();
    for (name, (dtype, _, bytes)) in &mut expected {
        if dtype == "F32" && got.get(name).is_some_and(|(d, ..)| d == "BF16") {
            *bytes = bytes
                .chunks(4)
                .flat_map(|b| {
                    half::bf16::from_f32(f32::from_le_bytes(b.try_into().unwrap())).to_le_bytes()
                })
                .collect();
            "BF16".clone_into(dtype);
        } else if dtype == "BF16" && got.get(name).is_some_and(|(d, ..)| d == "F32") {
            *bytes = bytes
                .chunks(2)
                .flat_map(|b| {
                    half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32().to_le_bytes()
                })
                .collect();
            "F32".clone_into(dtype);
        }
    }
    let got = got
        .iter()
        .map(|(name, (dtype, shape, bytes))| {
            let narrow = dtype == "F32" && expected.get(name).is_some_and(|(d, ..)| d == "BF16");
            let bytes = if narrow { narrowed(bytes) } else { bytes.clone() };
            let dtype = if narrow { "BF16".to_owned() } else { dtype.clone() };
            (name.clone(), (dtype, shape.clone(), bytes))
        })
        .collect();
    assert_same(&got, &expected, Zeros::Signed);
}

fn narrowed(bytes: &[u8]) -> Vec<u8> {
    let narrow = |b: &[u8]| half::bf16::from_f32(f32::from_le_bytes(b.try_into().unwrap()));
    bytes.chunks(4).flat_map(|b| narrow(b).to_le_bytes()).collect()
}

#[test]
fn scales_of_the_original_give_its_bytes() {
    for (folder, model) in FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        layouts(folder, model, dir.path());
        let path = golden(folder).join("checkpoint");
        let original = Arc::new(Checkpoint::open(&path).unwrap());
        let options = PlanOptions {
            quantize: Some(Quantize { original: Some(original), scale_dtype: None }),
            ..to(LayoutName::Hf)
        };
        let got = tensors_of_engine(&engine(model, &dir.path().join("native"), &options));
        let mut expected = BTreeMap::new();
        for file in std::fs::read_dir(&path).unwrap().map(|f| f.unwrap().path()) {
            if file.extension().is_some_and(|e| e == "safetensors") {
                expected.extend(tensors_of(&file));
            }
        }
        let names = |m: &BTreeMap<String, Tensor>| m.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&got), names(&expected), "{folder}");
        let mut bad = Vec::new();
        for (name, (dtype, shape, bytes)) in &expected {
            let (d, s, b) = &got[name];
            assert_eq!((d, s), (dtype, shape), "{name}");
            let wrong = b.iter().zip(bytes).filter(|(a, b)| a != b).count();
            if wrong > 0 {
                let first = b.iter().zip(bytes).position(|(a, b)| a != b).unwrap();
                bad.push(format!(
                    "{name}: {wrong} of {} bytes, first {first}: {:#x} expected {:#x}",
                    b.len(),
                    b[first],
                    bytes[first]
                ));
            }
        }
        println!("{folder}: {} bad of {}\n{}", bad.len(), expected.len(), bad.join("\n"));
    }
}
