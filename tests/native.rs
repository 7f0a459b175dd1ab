//! The native layout, tensor by tensor, against what the reference's adapters make of the same
//! checkpoints.

mod common;

use common::{Zeros, assert_same, engine, golden, tensors_of, tensors_of_engine};
use mount_ckpt::{PlanOptions, ScaleReading};

fn native_is_golden(folder: &str, model: &str, file: &str, options: &PlanOptions, zeros: Zeros) {
    let engine = engine(model, &golden(folder).join("checkpoint"), options);
    let expected = tensors_of(&golden(folder).join(file));
    assert_same(&tensors_of_engine(&engine), &expected, zeros);
}

#[test]
fn mimo_v2_flash() {
    let options = PlanOptions::default();
    native_is_golden(
        "mimo-v2-flash",
        "mimo-v2-flash",
        "native.safetensors",
        &options,
        Zeros::Signed,
    );
}

#[test]
fn mimo_v2_flash_with_scales_read_as_automodel_does() {
    let options = PlanOptions { scale_reading: ScaleReading::Automodel, ..PlanOptions::default() };
    let folder = golden("mimo-v2-flash");
    let engine = engine("mimo-v2-flash", &folder.join("checkpoint"), &options);
    let mut expected = tensors_of(&folder.join("native.safetensors"));
    // K and V of the layers with fused scales; all else is the same by both readings.
    let differ = tensors_of(&folder.join("native.automodel.safetensors"));
    assert_eq!(differ.len(), 4);
    expected.extend(differ);
    assert_same(&tensors_of_engine(&engine), &expected, Zeros::Signed);
}

#[test]
fn deepseek_v4_flash() {
    // The reference's FP4 table has +0.0 for code 8, ours -0.0 as the format has it.
    let options = PlanOptions::default();
    native_is_golden(
        "deepseek-v4-flash",
        "deepseek-v4",
        "native.safetensors",
        &options,
        Zeros::Equal,
    );
}

#[test]
fn deepseek_v4_base() {
    let options = PlanOptions::default();
    native_is_golden(
        "deepseek-v4-base",
        "deepseek-v4",
        "native.safetensors",
        &options,
        Zeros::Signed,
    );
}

#[test]
fn kimi_k25_vl() {
    let options = PlanOptions::default();
    native_is_golden("kimi-k25-vl", "kimi-k25-vl", "native.safetensors", &options, Zeros::Signed);
}

#[test]
fn qwen3_vl_moe_is_verbatim() {
    let options = PlanOptions::default();
    native_is_golden("qwen3-vl-moe", "qwen3-vl-moe", "native.safetensors", &options, Zeros::Signed);
    let engine = engine("qwen3-vl-moe", &golden("qwen3-vl-moe").join("checkpoint"), &options);
    let plan = engine.plan();
    assert_eq!(plan.summary.verbatim, plan.summary.view);
    assert!(plan.tensors.iter().all(|t| t.is_verbatim()));
}

#[test]
fn families_that_no_code_knows() {
    for model in ["deepseek-v3", "glm4-moe", "gpt-oss", "minimax-m2", "qwen3-moe"] {
        let options = PlanOptions::default();
        native_is_golden(model, model, "native.safetensors", &options, Zeros::Signed);
    }
}
