//! Tensors with wrong dtypes.

use safetensors::Dtype;

use crate::common::toy::Toy;
use crate::{BASE, Case, FLASH, KIMI, MIMO, QWEN, assert_refused};

#[test]
fn wrong_dtypes_are_refused_with_the_expected_ones() {
    let cases: &[Case] = &[
        (
            MIMO,
            |t| t.retype("~.0.up_proj.weight", Dtype::F8_E5M2),
            "1 payload of an impossible dtype: `~.0.up_proj.weight` (expected F8_E4M3 beside \
             `~.0.up_proj.weight_scale_inv`, got F8_E5M2)",
        ),
        (
            MIMO,
            |t| t.retype("~.0.up_proj.weight", Dtype::BF16),
            "1 payload of an impossible dtype: `~.0.up_proj.weight` (expected F8_E4M3 beside \
             `~.0.up_proj.weight_scale_inv`, got BF16)",
        ),
        (
            MIMO,
            |t| t.retype("~.0.up_proj.weight", Dtype::I8).drop("~.0.up_proj.weight_scale_inv"),
            "1 tensor whose dtype does not fit its rule: `~.0.up_proj.weight` (expected a \
             quantized matrix, BF16, F16 or F32, got I8)",
        ),
        (
            MIMO,
            |t| t.retype("~.0.up_proj.weight", Dtype::F64).drop("~.0.up_proj.weight_scale_inv"),
            "1 tensor whose dtype does not fit its rule: `~.0.up_proj.weight` (expected a \
             quantized matrix, BF16, F16 or F32, got F64)",
        ),
        (
            MIMO,
            |t| t.drop_all("~.0.up_proj.weight_scale").retype("~.0.up_proj.weight", Dtype::F4),
            "1 tensor whose dtype does not fit its rule: `~.0.up_proj.weight` (expected a \
             quantized matrix, BF16, F16 or F32, got F4)",
        ),
        (
            MIMO,
            |t| t.drop_all("scale_inv").each("_proj.weight", |t, n| t.retype(n, Dtype::I8)),
            "18 tensors whose dtypes do not fit their rules: `~.0.down_proj.weight` (expected a \
             quantized matrix, BF16, F16 or F32, got I8), `~.1.down_proj.weight` (expected a \
             quantized matrix, BF16, F16 or F32, got I8), `~.2.down_proj.weight` (expected a \
             quantized matrix, BF16, F16 or F32, got I8), `~.0.gate_proj.weight` (expected a \
             quantized matrix, BF16, F16 or F32, got I8), `~.0.up_proj.weight` (expected a \
             quantized matrix, BF16, F16 or F32, got I8) and 13 more",
        ),
        (
            MIMO,
            |t| t.retype("~.0.up_proj.weight_scale_inv", Dtype::I32),
            "1 scale of an impossible dtype: `~.0.up_proj.weight_scale_inv` (expected U8, F8_E8M0, \
             F16, BF16 or F32, got I32)",
        ),
        (
            MIMO,
            |t| t.retype("model.layers.0.self_attn.v_proj.weight", Dtype::BF16),
            "1 payload of an impossible dtype: `model.layers.0.self_attn.v_proj.weight` \
             (expected F8_E4M3 as `model.layers.0.self_attn.k_proj.weight`, got BF16)",
        ),
        (
            MIMO,
            |t| {
                t.retype("model.layers.0.self_attn.v_proj.weight", Dtype::BF16)
                    .drop("model.layers.0.self_attn.v_proj.weight_scale_inv")
            },
            "1 payload of an impossible dtype: `model.layers.0.self_attn.v_proj.weight` \
             (expected F8_E4M3 as `model.layers.0.self_attn.k_proj.weight`, got BF16)",
        ),
        (
            MIMO,
            |t| {
                t.retype("model.layers.0.self_attn.k_proj.weight", Dtype::BF16)
                    .drop("model.layers.0.self_attn.k_proj.weight_scale_inv")
            },
            "1 payload of an impossible dtype: `model.layers.0.self_attn.k_proj.weight` \
             (expected F8_E4M3 as `model.layers.0.self_attn.v_proj.weight`, got BF16)",
        ),
        (
            MIMO,
            |t| t.add("model.layers.0.self_attn.o_proj.weight_scale_inv", Dtype::F32, &[2, 2]),
            "1 payload of an impossible dtype: `model.layers.0.self_attn.o_proj.weight` \
             (expected F8_E4M3 beside `model.layers.0.self_attn.o_proj.weight_scale_inv`, got \
             BF16)",
        ),
        (
            FLASH,
            |t| t.retype("~.1.w1.weight", Dtype::I16),
            "1 payload of an impossible dtype: `~.1.w1.weight` (expected F4, U8, I8 or F8_E4M3 \
             beside `~.1.w1.scale`, got I16)",
        ),
        (
            FLASH,
            |t| t.retype("~.1.w1.scale", Dtype::I8),
            "1 scale of an impossible dtype: `~.1.w1.scale` (expected U8, F8_E8M0, F16, BF16 or \
             F32, got I8)",
        ),
        (
            FLASH,
            |t| t.retype("layers.1.attn_norm.weight", Dtype::F8_E4M3),
            "1 payload of an impossible shape: `layers.1.attn_norm.weight` (expected a matrix, \
             got F8_E4M3 [160])",
        ),
        (
            FLASH,
            |t| t.retype("embed.weight", Dtype::I8),
            "1 missing scale: `embed.scale` (for `embed.weight`, which is I8)",
        ),
        (
            FLASH,
            |t| t.add("layers.1.attn_norm.scale", Dtype::F32, &[1]),
            "1 payload of an impossible dtype: `layers.1.attn_norm.weight` (expected F4, U8, I8 \
             or F8_E4M3 beside `layers.1.attn_norm.scale`, got BF16)",
        ),
        (
            BASE,
            |t| t.retype("~.1.w1.weight", Dtype::U16),
            "1 payload of an impossible dtype: `~.1.w1.weight` (expected F4, U8, I8 or F8_E4M3 \
             beside `~.1.w1.scale`, got U16)",
        ),
        (
            BASE,
            |t| t.retype("~.1.w1.scale", Dtype::F64),
            "1 scale of an impossible dtype: `~.1.w1.scale` (expected U8, F8_E8M0, F16, BF16 or \
             F32, got F64)",
        ),
        (
            KIMI,
            |t| t.retype("~.1.up_proj.weight_packed", Dtype::U8),
            "1 payload of an impossible dtype: `~.1.up_proj.weight_packed` (expected I32 beside \
             `~.1.up_proj.weight_scale`, got U8)",
        ),
        (
            KIMI,
            |t| t.retype("~.1.up_proj.weight_packed", Dtype::I64),
            "1 payload of an impossible dtype: `~.1.up_proj.weight_packed` (expected I32 beside \
             `~.1.up_proj.weight_scale`, got I64)",
        ),
        (
            KIMI,
            |t| t.retype("~.1.up_proj.weight_scale", Dtype::F8_E8M0),
            "1 scale of an impossible dtype: `~.1.up_proj.weight_scale` (expected F16, BF16 or \
             F32, got F8_E8M0)",
        ),
        (
            KIMI,
            |t| t.retype("~.1.up_proj.weight_shape", Dtype::F32),
            "1 shape tensor that holds no two integers: `~.1.up_proj.weight_shape` (expected \
             I32 or I64 [2], got F32 [2])",
        ),
        (
            KIMI,
            |t| t.drop_all("~.1.up_proj.").add("~.1.up_proj.weight", Dtype::I32, &[64, 96]),
            "1 tensor whose dtype does not fit its rule: `~.1.up_proj.weight` (expected a \
             quantized matrix, BF16, F16 or F32, got I32)",
        ),
        (
            QWEN,
            |t| t.retype("~.gate_up_proj", Dtype::F8_E4M3),
            "1 missing scale: `~.gate_up_proj_scale_inv` (for `~.gate_up_proj`, which is \
             F8_E4M3)",
        ),
        (
            QWEN,
            |t| t.retype("~.gate_up_proj", Dtype::I16),
            "1 tensor whose dtype does not fit its rule: `~.gate_up_proj` (expected a quantized \
             matrix, BF16, F16 or F32, got I16)",
        ),
        (
            QWEN,
            |t| t.add("~.gate_up_proj_scale_inv", Dtype::F32, &[4, 1, 1]),
            "1 payload of an impossible dtype: `~.gate_up_proj` (expected F8_E4M3 beside \
             `~.gate_up_proj_scale_inv`, got BF16)",
        ),
    ];
    assert_refused(Toy::golden, cases);
}
