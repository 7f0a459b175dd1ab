//! Compares every tensor of the native layout with the output of Automodel's adapters for the same
//! checkpoints.

mod common;

use common::{Zeros, assert_same, engine, golden, tensors_of, tensors_of_engine};
use mount_ckpt::{PlanOptions, ScaleReading};

fn assert_native_is_golden(
    folder: &str,
    model: &str,
    file: &str,
    options: &PlanOptions,
    zeros: Zeros,
) {
    let engine = engine(model, &golden(folder).join("checkpoint"), options);
    let expected = tensors_of(&golden(folder).join(file));
    assert_same(&tensors_of_engine(&engine), &expected, zeros);
}

#[test]
fn mimo_v2_flash_is_golden() {
    let options = PlanOptions::default();
    assert_native_is_golden(
        "mimo-v2-flash",
        "mimo-v2-flash",
        "native.safetensors",
        &options,
        Zeros::Signed,
    );
}

#[test]
fn mimo_v2_flash_is_golden_with_the_scale_reading_of_automodel() {
    let options = PlanOptions { scale_reading: ScaleReading::Automodel, ..PlanOptions::default() };
    let folder = golden("mimo-v2-flash");
    let engine = engine("mimo-v2-flash", &folder.join("checkpoint"), &options);
    let mut expected = tensors_of(&folder.join("native.safetensors"));
    // K and V of the layers with fused scales. All other tensors are the same with both readings.
    let differ = tensors_of(&folder.join("native.automodel.safetensors"));
    assert_eq!(differ.len(), 4);
    expected.extend(differ);
    assert_same(&tensors_of_engine(&engine), &expected, Zeros::Signed);
}

#[test]
fn deepseek_v4_flash_is_golden() {
    // Automodel decodes FP4 code 8 to +0.0, the format to -0.0.
    let options = PlanOptions::default();
    assert_native_is_golden(
        "deepseek-v4-flash",
        "deepseek-v4",
        "native.safetensors",
        &options,
        Zeros::Equal,
    );
}

#[test]
fn deepseek_v4_base_is_golden() {
    let options = PlanOptions::default();
    assert_native_is_golden(
        "deepseek-v4-base",
        "deepseek-v4",
        "native.safetensors",
        &options,
        Zeros::Signed,
    );
}

#[test]
fn kimi_k25_vl_is_golden() {
    let options = PlanOptions::default();
    assert_native_is_golden(
        "kimi-k25-vl",
        "kimi-k25-vl",
        "native.safetensors",
        &options,
        Zeros::Signed,
    );
}

#[test]
fn qwen3_vl_moe_is_golden_and_verbatim() {
    let options = PlanOptions::default();
    assert_native_is_golden(
        "qwen3-vl-moe",
        "qwen3-vl-moe",
        "native.safetensors",
        &options,
        Zeros::Signed,
    );
    let engine = engine("qwen3-vl-moe", &golden("qwen3-vl-moe").join("checkpoint"), &options);
    let plan = engine.plan();
    assert_eq!(plan.summary.verbatim, plan.summary.view);
    assert!(plan.tensors.iter().all(|t| t.is_verbatim()));
}

#[test]
fn plain_families_are_golden() {
    for model in ["deepseek-v3", "glm4-moe", "gpt-oss", "minimax-m2", "qwen3-moe"] {
        let options = PlanOptions::default();
        assert_native_is_golden(model, model, "native.safetensors", &options, Zeros::Signed);
    }
}
