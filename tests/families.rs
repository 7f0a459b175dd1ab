//! Families that need only a mapping file: their other releases, and the checkpoints that they
//! refuse.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use common::{
    Tensor, Zeros, assert_same, config_of_view, engine, golden, plan, tensors_of, tensors_of_dir,
    tensors_of_engine, write_checkpoint,
};
use mount_ckpt::{
    Checkpoint, ExpertParallel, ExpertShard, Float, LayoutName, PlanOptions, Quantize, Unmapped,
};
use serde_json::{Value, json};

type Tensors = BTreeMap<String, Tensor>;

fn published(folder: &str) -> (Value, Tensors) {
    let dir = golden(folder).join("checkpoint");
    let config = std::fs::read(dir.join("config.json")).unwrap();
    (serde_json::from_slice(&config).unwrap(), tensors_of_dir(&dir))
}

fn directory(config: &Value, tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &config.to_string(), tensors);
    dir
}

fn native(model: &str, dir: &Path) -> Tensors {
    tensors_of_engine(&engine(model, dir, &PlanOptions::default()))
}

fn to(layout: LayoutName) -> PlanOptions {
    PlanOptions { to: Some(layout), ..PlanOptions::default() }
}

/// Renames tensors; those for which `name` returns `None` are omitted.
fn renamed(tensors: &Tensors, name: impl Fn(&str) -> Option<String>) -> Tensors {
    tensors.iter().filter_map(|(n, t)| Some((name(n)?, t.clone()))).collect()
}

fn f32s(shape: &[usize]) -> Tensor {
    ("F32".to_owned(), shape.to_vec(), vec![0; 4 * shape.iter().product::<usize>()])
}

#[test]
fn names_without_a_rule_are_refused() {
    let cases = [
        ("deepseek-v3", "model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("deepseek-v3", "model.layers.1.mlp.experts.03.gate_proj.weight"),
        ("deepseek-v3", "model.layers.1.self_attn.indexer.wk.weight"),
        ("deepseek-v3", "model.layers.1.eh_proj.weight"),
        ("glm4-moe", "model.layers.1.self_attn.o_proj.bias"),
        ("glm4-moe", "model.layers.1.mlp.experts.gate_up_proj.weight"),
        ("gpt-oss", "model.layers.2.mlp.experts.gate_up_proj"),
        ("gpt-oss", "model.layers.0.mlp.gate.extra"),
        ("minimax-m2", "model.layers.0.block_sparse_moe.experts.0.w4.weight"),
        ("minimax-m2", "model.layers.2.input_layernorm.weight"),
        ("minimax-m2", "model.mtp.norm.weight"),
        ("qwen3-moe", "model.layers.0.mlp.shared_expert.up_proj.weight"),
        ("qwen3-moe", "lm_head.bias"),
    ];
    for (model, name) in cases {
        let (config, mut tensors) = published(model);
        tensors.insert(name.to_owned(), f32s(&[2, 2]));
        let dir = directory(&config, &tensors);
        for layout in [LayoutName::Native, LayoutName::Transformers, LayoutName::Hf] {
            let message = plan(model, dir.path(), &to(layout)).unwrap_err().to_string();
            let expected = format!(
                "1 tensor that no rule of the mapping takes: \
                 `{name}`"
            );
            assert_eq!(message, expected, "{model} {layout}");
        }
    }
}

/// Regression: they were dropped as if they belonged to an MTP layer beyond the number in
/// config.json.
#[test]
fn names_without_a_rule_in_an_mtp_layer_are_refused() {
    let cases = [
        ("deepseek-v3", "deepseek-v3", "model.layers.2.mlp.experts.3.gate_proj.weight"),
        ("glm4-moe", "glm4-moe", "model.layers.2.shared_head.bias"),
        ("deepseek-v4-flash", "deepseek-v4", "mtp.0.ffn.experts.3.w1.weight"),
        ("deepseek-v4-flash", "deepseek-v4", "mtp.0.unknown.weight"),
    ];
    for (folder, model, name) in cases {
        let (config, mut tensors) = published(folder);
        tensors.insert(name.to_owned(), f32s(&[2, 2]));
        let dir = directory(&config, &tensors);
        let message = plan(model, dir.path(), &to(LayoutName::Native)).unwrap_err().to_string();
        assert!(message.ends_with(&format!("no rule of the mapping takes: `{name}`")), "{message}");
    }
}

#[test]
fn mtp_layers_beyond_the_config_are_dropped_and_counted() {
    let (mut config, tensors) = published("deepseek-v3");
    config["num_nextn_predict_layers"] = json!(0);
    let dir = directory(&config, &tensors);
    let mut expected = tensors_of(&golden("deepseek-v3").join("native.safetensors"));
    expected.retain(|name, _| !name.starts_with("model.layers.2."));
    assert_same(&native("deepseek-v3", dir.path()), &expected, Zeros::Signed);
    let plan = plan("deepseek-v3", dir.path(), &PlanOptions::default()).unwrap();
    let reason = "MTP depth at or above num_nextn_predict_layers";
    assert!(plan.to_string().contains(reason), "{plan}");
}

/// Kimi K2 Thinking has the names of DeepSeek V3 and the INT4 experts of Kimi K2.5.
#[test]
fn int4_release_of_kimi_k2_equals_the_language_model_of_kimi_k25() {
    let text = |name: &str| {
        let name = name.strip_prefix("language_model.")?;
        (!name.contains("proj.0.")).then(|| name.to_owned())
    };
    let (config, tensors) = published("kimi-k25-vl");
    let mut config = config["text_config"].clone();
    config["model_type"] = json!("kimi_k2");
    let dir = directory(&config, &renamed(&tensors, text));
    // The native layout of Kimi K2.5 casts floats, that of K2 does not; `transformers` casts none.
    let source = golden("kimi-k25-vl").join("checkpoint");
    let vl = tensors_of_engine(&engine("kimi-k25-vl", &source, &to(LayoutName::Transformers)));
    let expected = renamed(&vl, |name| {
        let rest = name.strip_prefix("model.language_model.").map(|r| format!("model.{r}"));
        rest.or_else(|| name.starts_with("lm_head").then(|| name.to_owned()))
    });
    let options = to(LayoutName::Transformers);
    let got = tensors_of_engine(&engine("deepseek-v3", dir.path(), &options));
    assert_same(&got, &expected, Zeros::Signed);
}

/// The reference is wrong for these releases: it casts the codes and drops the scales.
#[test]
fn fp8_release_of_qwen3_moe_is_dequantized() {
    let name = |name: &str| {
        let name = name.replace("block_sparse_moe.", "mlp.");
        let parts = [(".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj.")];
        let name = parts.iter().fold(name, |n, (from, to)| n.replace(from, to));
        (!name.ends_with("e_score_correction_bias")).then_some(name)
    };
    let (mut config, tensors) = published("minimax-m2");
    config["model_type"] = json!("qwen3_moe");
    config["moe_intermediate_size"] = config["intermediate_size"].clone();
    let dir = directory(&config, &renamed(&tensors, name));
    let golden = tensors_of(&golden("minimax-m2").join("native.safetensors"));
    assert_same(&native("qwen3-moe", dir.path()), &renamed(&golden, name), Zeros::Signed);
}

/// GLM-4.5-FP8 and similar releases have one scale per row, under another name. Regression: they
/// were refused.
#[test]
fn fp8_release_of_glm_has_a_scale_for_each_row() {
    let (config, mut tensors) = published("glm4-moe");
    let name = "model.layers.0.mlp.up_proj.weight";
    // 0x38 + n is 1 + n / 8 for n below 8; row r has the scale r + 1.
    let codes: Vec<u8> = (0..64 * 64).map(|i| 0x38 + i as u8 % 8).collect();
    let scales = (1..=64u8).flat_map(|r| f32::from(r).to_le_bytes()).collect();
    tensors.insert(name.to_owned(), ("F8_E4M3".to_owned(), vec![64, 64], codes));
    let scale = ("F32".to_owned(), vec![64, 1], scales);
    tensors.insert("model.layers.0.mlp.up_proj.weight_scale".to_owned(), scale);
    let dir = directory(&config, &tensors);
    let (dtype, shape, bytes) = &native("glm4-moe", dir.path())[name];
    assert_eq!((dtype.as_str(), &**shape), ("BF16", &[64, 64][..]));
    for (i, pair) in bytes.chunks(2).enumerate() {
        let expected = (1.0 + (i % 8) as f32 / 8.0) * (i / 64 + 1) as f32;
        let expected = half::bf16::from_f32(expected).to_le_bytes();
        assert_eq!(pair, expected, "element {i}");
    }
}

#[test]
fn bf16_release_of_gpt_oss_is_verbatim() {
    let source = golden("gpt-oss").join("checkpoint");
    let (config, _) = published("gpt-oss");
    let hf = tensors_of_engine(&engine("gpt-oss", &source, &to(LayoutName::Hf)));
    let dir = directory(&config, &hf);
    for layout in [LayoutName::Native, LayoutName::Transformers, LayoutName::Hf] {
        let engine = engine("gpt-oss", dir.path(), &to(layout));
        assert!(engine.plan().tensors.iter().all(|t| t.is_verbatim()), "{layout}");
    }
    let golden = tensors_of(&golden("gpt-oss").join("native.safetensors"));
    assert_same(&native("gpt-oss", dir.path()), &golden, Zeros::Signed);
}

#[test]
fn biases_of_stacked_experts_are_sliced_and_not_cast() {
    let options = PlanOptions {
        dtype: Float::F32,
        expert_parallel: Some(ExpertParallel { size: 2, rank: Some(1) }),
        expert_shard: Some(ExpertShard { size: 2, rank: 1 }),
        ..PlanOptions::default()
    };
    let source = golden("gpt-oss").join("checkpoint");
    let got = tensors_of_engine(&engine("gpt-oss", &source, &options));
    let bias = "model.layers.0.mlp.experts.gate_up_proj_bias";
    let cases: [(&str, &str, &[usize]); 4] = [
        ("model.layers.0.mlp.experts.gate_and_up_projs", "F32", &[1, 48, 128]),
        ("model.layers.0.mlp.experts.down_projs", "F32", &[1, 32, 96]),
        (bias, "BF16", &[1, 64]),
        ("model.layers.0.mlp.experts.down_proj_bias", "BF16", &[1, 48]),
    ];
    for (name, dtype, shape) in cases {
        assert_eq!((&*got[name].0, &*got[name].1), (dtype, shape), "{name}");
    }
    // Expert 2 of 3, columns 64..128 of 128, two bytes each.
    let whole = &published("gpt-oss").1[bias].2;
    assert_eq!(got[bias].2, whole[(2 * 128 + 64) * 2..]);
}

#[test]
fn an_unmapped_matrix_keeps_the_orientation_of_its_decoder() {
    let (mut config, tensors) = published("gpt-oss");
    config["num_hidden_layers"] = json!(1);
    let dir = directory(&config, &tensors);
    let options = PlanOptions { unmapped: Unmapped::Keep, ..PlanOptions::default() };
    let got = tensors_of_engine(&engine("gpt-oss", dir.path(), &options));
    let golden = tensors_of(&golden("gpt-oss").join("native.safetensors"));
    let pair = |tensors: &Tensors, name: &str| {
        BTreeMap::from([(
            "x".to_owned(),
            tensors[&format!("model.layers.1.mlp.experts.{name}")].clone(),
        )])
    };
    assert_same(&pair(&got, "gate_up_proj"), &pair(&golden, "gate_and_up_projs"), Zeros::Signed);
}

/// Training frameworks copy config.json, with its quantization, to the plain weights that they
/// save.
#[test]
fn a_native_checkpoint_loses_a_stale_quantization_config() {
    let (config, _) = published("deepseek-v3");
    let tensors = tensors_of(&golden("deepseek-v3").join("native.safetensors"));
    let dir = directory(&config, &tensors);
    let engine = engine("deepseek-v3", dir.path(), &PlanOptions::default());
    assert_eq!(config_of_view(engine).get("quantization_config"), None);
}

#[test]
fn a_native_checkpoint_is_quantized_like_its_release() {
    let options = PlanOptions {
        quantize: Some(Quantize { original: None, scale_dtype: None }),
        ..to(LayoutName::Hf)
    };
    let listing = |tensors: &Tensors| {
        tensors.iter().map(|(n, (d, s, _))| (n.clone(), d.clone(), s.clone())).collect::<Vec<_>>()
    };
    for model in ["deepseek-v3", "gpt-oss", "minimax-m2"] {
        let (mut config, tensors) = published(model);
        let quantization = config.as_object_mut().unwrap().remove("quantization_config").unwrap();
        let dir = directory(&config, &tensors_of(&golden(model).join("native.safetensors")));
        let engine = engine(model, dir.path(), &options);
        let got = tensors_of_engine(&engine);
        assert_eq!(listing(&got), listing(&tensors), "{model}");
        assert_eq!(config_of_view(engine)["quantization_config"], quantization, "{model}");
        // Read as a checkpoint again, it has the tensors of the native layout. Values differ by
        // quantization.
        let mut config = published(model).0;
        config["quantization_config"] = quantization;
        let again = directory(&config, &got);
        let names = |t: &Tensors| t.keys().cloned().collect::<Vec<_>>();
        let golden = tensors_of(&golden(model).join("native.safetensors"));
        assert_eq!(names(&native(model, again.path())), names(&golden), "{model}");
    }
    // The mapping cannot write the quantization of any release of this family.
    let dir = directory(&published("glm4-moe").0, &published("glm4-moe").1);
    let message = plan("glm4-moe", dir.path(), &options).unwrap_err().to_string();
    assert_eq!(
        message,
        "the mapping `glm4-moe` does not say which tensors of this checkpoint are quantized: take \
         it from the original checkpoint"
    );
}

/// BF16 cannot represent codes under extreme scales. Only these tensors have such scales.
#[test]
fn quantizing_with_the_scales_of_the_release_restores_its_bytes() {
    let extremes = [
        ("deepseek-v3", vec!["model.layers.1.mlp.experts.0.gate_proj.weight"]),
        ("gpt-oss", vec!["model.layers.0.mlp.experts.gate_up_proj_blocks"]),
        ("minimax-m2", vec!["model.layers.0.block_sparse_moe.experts.0.w1.weight"]),
    ];
    for (model, extremes) in extremes {
        let (config, tensors) = published(model);
        let path = golden(model).join("checkpoint");
        let original = Arc::new(Checkpoint::open(&path).unwrap());
        let options = PlanOptions {
            quantize: Some(Quantize { original: Some(original), scale_dtype: None }),
            ..to(LayoutName::Hf)
        };
        let dir = directory(&config, &tensors_of(&golden(model).join("native.safetensors")));
        let got = tensors_of_engine(&engine(model, dir.path(), &options));
        let differ = |(name, tensor): (&String, &Tensor)| {
            (got.get(name) != Some(tensor)).then(|| name.clone())
        };
        let different: Vec<_> = tensors.iter().filter_map(differ).collect();
        assert_eq!(different, extremes, "{model}");
        assert_eq!(got.len(), tensors.len(), "{model}");
    }
}
