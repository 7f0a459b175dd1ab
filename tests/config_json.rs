//! config.json of a view states the quantization and dtype of the view, whatever the config.json of
//! the source states.

mod common;

use common::toy::Toy;
use common::{FAMILIES, config_of, exported, tensors_of_dir};
use mount_ckpt::LayoutName;
use serde_json::json;

fn written(toy: &Toy) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    toy.write(dir.path());
    dir
}

/// Exports a view of a toy.
fn view(toy: &Toy, options: &[&str]) -> tempfile::TempDir {
    exported(written(toy).path(), options).unwrap_or_else(|e| panic!("{}: {e}", toy.model))
}

const QUANTIZE: [&str; 4] = ["--to", "hf", "--quantize", "checkpoint"];

/// Regression: `quantization_config` was copied from the source. It stated groups of 128 for scales
/// of groups of 32, blocks of 64 rows for blocks of 128, and bitsandbytes for FP8.
#[test]
fn config_json_states_the_block_size_of_a_quantized_view() {
    let groups = json!({ "group_0": { "weights": {
        "num_bits": 8, "type": "int", "symmetric": false, "group_size": 128
    } } });
    let stale = [
        json!(null),
        json!({ "quant_method": "bitsandbytes", "load_in_4bit": true }),
        json!({ "quant_method": "fp8", "weight_block_size": [64, 128], "scale_fmt": "ue8m0" }),
        json!({ "quant_method": "compressed-tensors", "config_groups": groups }),
    ];
    let families = ["deepseek-v3", "minimax-m2", "mimo-v2-flash", "qwen3-moe", "kimi-k25-vl"];
    for family in families {
        for stale in &stale {
            let mut toy = Toy::in_layout(family, LayoutName::Native);
            let text = family == "kimi-k25-vl";
            let place =
                if text { "text_config.quantization_config" } else { "quantization_config" };
            toy.set(place, stale.clone());
            let view = view(&toy, &QUANTIZE);
            let config = config_of(view.path());
            let stated = if text { &config["text_config"] } else { &config };
            let stated = &stated["quantization_config"];
            if text {
                let weights = &stated["config_groups"]["group_0"]["weights"];
                let expected = [json!(4), json!("int"), json!(true), json!(32)];
                let keys = ["num_bits", "type", "symmetric", "group_size"];
                assert_eq!(keys.map(|k| weights[k].clone()), expected, "{family} {stale}");
                assert_eq!(stated["format"], "pack-quantized");
            } else {
                assert_eq!(stated["quant_method"], "fp8", "{family} {stale}");
                assert_eq!(stated["weight_block_size"], json!([128, 128]), "{family} {stale}");
                assert_eq!(stated.get("scale_fmt"), None, "{family} {stale}");
                assert_eq!(stated.get("config_groups"), None, "{family} {stale}");
            }
            // Opening a checkpoint with wrong block sizes in config.json fails.
            exported(view.path(), &["--to", "native"]).unwrap_or_else(|e| panic!("{family}: {e}"));
        }
    }
}

/// Regression: `scale_fmt: ue8m0` was copied, although no scale was a power of two.
#[test]
fn scale_fmt_is_stated_only_where_all_scales_are_powers_of_two() {
    for (family, stated) in [("deepseek-v4-flash", true), ("deepseek-v4-base", false)] {
        let view = view(&Toy::in_layout(family, LayoutName::Native), &QUANTIZE);
        let config = config_of(view.path());
        let format = config["quantization_config"].get("scale_fmt");
        assert_eq!(format, stated.then(|| json!("ue8m0")).as_ref(), "{family}");
        let tensors = tensors_of_dir(view.path());
        let scales = tensors.iter().filter(|(name, _)| {
            let payload = name.strip_suffix(".scale").map(|m| format!("{m}.weight"));
            payload.is_some_and(|p| tensors.contains_key(&p))
        });
        let dtypes: Vec<&str> = scales.map(|(_, (dtype, ..))| dtype.as_str()).collect();
        assert_eq!(dtypes.len(), 89, "{family}");
        let expected = if stated { "F8_E8M0" } else { "F32" };
        assert!(dtypes.iter().all(|d| *d == expected), "{family}");
    }
}

/// Regression: attention, shared experts and dense layers of Kimi K2 Thinking were written as FP8,
/// while config.json stated compressed-tensors and excluded them. A loader would read the codes as
/// weights.
#[test]
fn kimi_k2_quantizes_only_its_experts_to_int4() {
    let mut toy = Toy::in_layout("deepseek-v3", LayoutName::Native);
    toy.set("model_type", "kimi_k2").set(
        "quantization_config",
        json!({ "quant_method": "compressed-tensors", "format": "pack-quantized" }),
    );
    let plain = view(&toy, &["--to", "hf"]);
    let plain = tensors_of_dir(plain.path());
    let view = view(&toy, &QUANTIZE);
    let tensors = tensors_of_dir(view.path());
    assert!(tensors.contains_key("model.layers.1.mlp.experts.0.up_proj.weight_packed"));
    assert!(tensors.contains_key("model.layers.1.self_attn.o_proj.weight"));
    for (name, (dtype, shape, bytes)) in &tensors {
        if name.contains(".experts.") {
            let ends = ["weight_packed", "weight_scale", "weight_shape"];
            assert!(ends.iter().any(|end| name.ends_with(end)), "{name}");
        } else {
            let expected = &plain[name];
            assert!((dtype, shape, bytes) == (&expected.0, &expected.1, &expected.2), "{name}");
        }
    }
    assert_eq!(config_of(view.path())["quantization_config"]["format"], "pack-quantized");
    // A compressed-tensors config with the format `float-quantized` gives FP8, not INT4.
    toy.set("quantization_config.format", "float-quantized");
    let view = self::view(&toy, &QUANTIZE);
    let name = "model.layers.1.mlp.experts.0.up_proj.weight";
    assert_eq!(tensors_of_dir(view.path())[name].0, "F8_E4M3");
    assert_eq!(config_of(view.path())["quantization_config"]["quant_method"], "fp8");
}

/// Regression: plain weights kept the `quantization_config` that fp8_cast_bf16.py leaves behind, so
/// a loader would dequantize them.
#[test]
fn a_plain_view_states_no_quantization() {
    let left = json!({ "quant_method": "fp8", "weight_block_size": [128, 128] });
    let places = [
        "quantization_config",
        "compression_config",
        "text_config.quantization_config",
        "vision_config.quantization_config",
        // Configs nested in nested configs.
        "thinker_config.text_config.quantization_config",
    ];
    for family in FAMILIES {
        let mut toy = Toy::in_layout(family, LayoutName::Native);
        // An added `text_config` does not matter otherwise: keys are looked up at the top level
        // first.
        for place in places {
            toy.set(place, left.clone());
        }
        let mut from_published = Toy::golden(family);
        from_published.set("vision_config.quantization_config", left.clone());
        from_published.set("thinker_config.text_config.quantization_config", left.clone());
        for (toy, to) in [(&toy, "hf"), (&from_published, "native"), (&from_published, "hf")] {
            let text = config_of(view(toy, &["--to", to]).path()).to_string();
            assert!(!text.contains("quantization_config"), "{family} {to} {text}");
            assert!(!text.contains("compression_config"), "{family} {to} {text}");
        }
    }
}

/// Regression: a filtered view without quantized tensors stated a quantization.
#[test]
fn a_filtered_view_without_quantized_tensors_states_no_quantization() {
    let toy = Toy::in_layout("deepseek-v3", LayoutName::Native);
    for (part, states) in [(".*norm.*", false), (".*norm.*|.*o_proj.*", true)] {
        let view = view(&toy, &[&QUANTIZE[..], &["--include", part]].concat());
        let config = config_of(view.path());
        assert_eq!(config.get("quantization_config").is_some(), states, "{part}");
    }
}

/// Loaders read some of these files before config.json.
#[test]
fn files_that_state_a_quantization_are_left_out() {
    let names = [
        "hf_quant_config.json",
        "quantize_config.json",
        "quant_config.json",
        "quant_model_description.json",
    ];
    let dir = written(&Toy::golden("deepseek-v3"));
    for name in names.iter().chain(&["generation_config.json"]) {
        std::fs::write(dir.path().join(name), r#"{"quantization":{"quant_algo":"FP8"}}"#).unwrap();
    }
    for options in [&["--to", "native"][..], &["--to", "hf"], &QUANTIZE] {
        let view = exported(dir.path(), options).unwrap();
        let exists = |name: &&&str| view.path().join(name).exists();
        assert_eq!(names.iter().find(exists), None, "{options:?}");
        assert!(view.path().join("generation_config.json").exists());
    }
}

/// Regression: config.json stated bfloat16 for F32 and F16 weights.
#[test]
fn the_dtype_of_a_view_is_stated() {
    let cases = [
        ("deepseek-v3", "/torch_dtype"),
        ("minimax-m2", "/dtype"),
        ("mimo-v2-flash", "/torch_dtype"),
        ("qwen3-moe", "/torch_dtype"),
    ];
    for (family, key) in cases {
        for (option, name) in [("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16")] {
            let mut toy = Toy::golden(family);
            let view = |toy: &Toy| view(toy, &["--to", "native", "--dtype", option]);
            let stated = |toy: &Toy| config_of(view(toy).path()).pointer(key).cloned();
            assert_eq!(stated(&toy), Some(name.into()), "{family}");
            // A value that a tool may have copied from the dtype of the payloads.
            toy.set(&key[1..], "torch.float8_e4m3fn");
            assert_eq!(stated(&toy), Some(name.into()), "{family}");
        }
    }
}

/// Regression: a config.json with these constants, which Python writes but JSON does not have, was
/// refused.
#[test]
fn infinity_and_nan_in_config_json_are_kept() {
    let dir = written(&Toy::golden("qwen3-moe"));
    let path = dir.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let odd = r#"{"a": Infinity, "b": [-Infinity, "Infinity", "\"NaN"], "c": {"d": NaN}, "#;
    std::fs::write(&path, text.replacen('{', odd, 1)).unwrap();
    // The first view passes the source's bytes through, the second has a new config.json.
    for dtype in ["bf16", "f32"] {
        let view = exported(dir.path(), &["--to", "native", "--dtype", dtype]).unwrap();
        let text = std::fs::read_to_string(view.path().join("config.json")).unwrap();
        let compact: String = text.split_whitespace().collect();
        let expected = r#"{"a":Infinity,"b":[-Infinity,"Infinity","\"NaN"],"c":{"d":NaN},"#;
        assert!(compact.starts_with(expected), "{text}");
    }
}
