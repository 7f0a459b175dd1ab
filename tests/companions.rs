//! A checkpoint whose quantization has a part that is not supported, in a tensor next to a weight
//! or in config.json, is refused, whatever `--unmapped` says.

mod common;

use common::toy::Toy;
use mount_ckpt::{LayoutName, PlanOptions, Unmapped};
use safetensors::Dtype;
use serde_json::{Value, json};

const LAYOUTS: [LayoutName; 3] = [LayoutName::Hf, LayoutName::Native, LayoutName::Transformers];

/// Opens the checkpoint with every layout and every value of `--unmapped`. `Ok` is the message of a
/// refusal, `Err` the summary of a plan that was accepted.
fn refusals(toy: &Toy) -> Vec<Result<String, String>> {
    let ways = [Unmapped::Refuse, Unmapped::Keep, Unmapped::Drop];
    let options = LAYOUTS.iter().flat_map(|layout| {
        ways.iter().map(|unmapped| PlanOptions {
            to: Some(*layout),
            unmapped: *unmapped,
            ..PlanOptions::default()
        })
    });
    let mounted = |o: PlanOptions| {
        toy.mount(&o, |_| {}).map(|m| m.engine.plan().summary.to_string()).map_or_else(Err, Ok)
    };
    options
        .map(|o| match mounted(o) {
            Ok(summary) => Err(summary),
            Err(message) => Ok(message),
        })
        .collect()
}

/// Regression: the message about a zero point next to INT4 advised `--unmapped drop`. With that
/// option, 99.6 % of the weights were wrong and `verify` passed.
#[test]
fn unsupported_quantization_tensors_are_refused() {
    let kimi = "language_model.model.layers.1";
    let cases: &[(&str, &str, &str)] = &[
        ("kimi-k25-vl", "~.1.up_proj.weight", "~.1.up_proj.weight_zero_point"),
        ("kimi-k25-vl", "~.1.up_proj.weight", "~.1.up_proj.weight_g_idx"),
        ("kimi-k25-vl", "~.1.up_proj.weight", "~.1.up_proj.qzeros"),
        ("kimi-k25-vl", "~.1.up_proj.weight", "~.1.up_proj.g_idx"),
        // Rules that match all tensors of attention must not match a zero point.
        ("kimi-k25-vl", "@.self_attn.o_proj.weight", "@.self_attn.o_proj.weight_zero_point"),
        ("kimi-k25-vl", "@.self_attn.o_proj.weight", "@.self_attn.o_proj.weight_g_idx"),
        ("deepseek-v3", "~.1.up_proj.weight", "~.1.up_proj.weight_zero_point"),
        ("deepseek-v3", "~.1.up_proj.weight", "~.1.up_proj.weight_scale_2"),
        ("deepseek-v4-flash", "~.1.w1.weight", "~.1.w1.weight_global_scale"),
        ("deepseek-v4-flash", "layers.1.attn.wkv.weight", "layers.1.attn.wkv.weight_zero_point"),
        ("deepseek-v4-base", "~.1.w1.weight", "~.1.w1.weight_offset"),
        ("minimax-m2", "~.1.w1.weight", "~.1.w1.weight_zero_point"),
        (
            "mimo-v2-flash",
            "model.layers.1.self_attn.v_proj.weight",
            "model.layers.1.self_attn.v_proj.weight_zero_point",
        ),
        ("gpt-oss", "~.gate_up_proj", "~.gate_up_proj_zero_point"),
        ("gpt-oss", "~.down_proj", "~.down_proj_global_scale"),
        // A second scale is refused, since it is unknown which of the two is right.
        ("deepseek-v3", "~.1.up_proj.weight", "~.1.up_proj.weight_scale"),
    ];
    for (family, matrix, part) in cases {
        let whole = |name: &str| name.replace('@', kimi);
        let mut toy = Toy::golden(family);
        toy.add(&whole(part), Dtype::I32, &[2]);
        let expected = format!(
            "1 part of a quantization that is not supported: `{}` (of `{}`)",
            whole(part),
            whole(matrix)
        );
        for got in refusals(&toy) {
            assert_eq!(got.as_ref(), Ok(&expected), "{family}");
        }
    }
}

/// Scales of activations do not change weights, so `--unmapped` decides about them.
#[test]
fn activation_scales_follow_the_unmapped_option() {
    for name in ["~.1.up_proj.input_scale", "model.layers.1.self_attn.o_proj.input_scale"] {
        let mut toy = Toy::golden("deepseek-v3");
        toy.add(name, Dtype::F32, &[]);
        let refused: Vec<bool> = refusals(&toy).iter().map(Result::is_ok).collect();
        assert_eq!(refused, [true, false, false].repeat(3), "{name}");
    }
}

/// Regression: `symmetric`, `num_bits`, `format` and `actorder` of config.json were ignored.
#[test]
fn unsupported_int4_settings_in_config_json_are_refused() {
    let weights = "text_config.quantization_config.config_groups.group_0.weights";
    let format = "text_config.quantization_config.format";
    let cases: &[(&str, &str, Value, bool)] = &[
        (weights, "symmetric", json!(false), false),
        (weights, "num_bits", json!(8), false),
        (weights, "actorder", json!("group"), false),
        (weights, "actorder", json!("static"), true),
        (weights, "actorder", json!("weight"), true),
        (weights, "actorder", json!(null), true),
        (format, "", json!("marlin-24"), false),
        (format, "", json!("int-quantized"), false),
        (format, "", json!(null), true),
    ];
    for (place, key, value, mounts) in cases {
        let mut toy = Toy::golden("kimi-k25-vl");
        let path = if key.is_empty() { (*place).to_owned() } else { format!("{place}.{key}") };
        toy.set(&path, value.clone());
        for got in refusals(&toy) {
            match got {
                Ok(message) => {
                    let key = path.strip_prefix("text_config.").unwrap();
                    assert!(message.contains(&format!("`{key}`")) && !mounts, "{message}");
                }
                Err(summary) => assert!(mounts, "{path} {value}: {summary}"),
            }
        }
    }
    // The same at the top level of config.json. For plain weights these keys do not matter.
    let mut toy = Toy::golden("kimi-k25-vl");
    toy.set(&format!("{weights}.symmetric"), false);
    let stated = toy.config["text_config"]["quantization_config"].take();
    toy.set("quantization_config", stated.clone());
    assert!(refusals(&toy).iter().all(Result::is_ok));
    let mut plain = Toy::in_layout("kimi-k25-vl", LayoutName::Native);
    plain.set("quantization_config", stated);
    assert!(refusals(&plain).iter().all(Result::is_err));
}
