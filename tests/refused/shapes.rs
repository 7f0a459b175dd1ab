//! Tensors with wrong shapes.

use safetensors::Dtype;

use crate::common::toy::Toy;
use crate::{BASE, Case, FLASH, KIMI, MIMO, QWEN, assert_refused};

#[test]
fn wrong_shapes_are_refused_with_the_expected_ones() {
    let cases: &[Case] = &[
        (
            MIMO,
            |t| t.reshape("~.0.up_proj.weight", &[143, 136]),
            "1 tensor whose shape does not fit its rule: `~.0.up_proj.weight` (expected [144, \
             136], got [143, 136])",
        ),
        (
            MIMO,
            |t| t.reshape("~.0.up_proj.weight", &[136, 144]),
            "1 tensor whose shape does not fit its rule: `~.0.up_proj.weight` (expected [144, \
             136], got [136, 144])",
        ),
        (
            MIMO,
            |t| t.reshape("~.0.up_proj.weight", &[1, 144, 136]),
            "1 scale of an impossible shape: `~.0.up_proj.weight_scale_inv` (expected [1, 2, \
             2], got [2, 2]: [1, 144, 136] in blocks of 128x128)",
        ),
        (
            MIMO,
            |t| t.reshape("~.0.up_proj.weight", &[144 * 136]),
            "1 payload of an impossible shape: `~.0.up_proj.weight` (expected a matrix, got \
             F8_E4M3 [19584])",
        ),
        (
            MIMO,
            |t| t.reshape("~.0.up_proj.weight", &[0, 136]),
            "1 payload of an impossible shape: `~.0.up_proj.weight` (expected a matrix, got \
             F8_E4M3 [0, 136])",
        ),
        (
            MIMO,
            |t| {
                t.drop_all("~.0.up_proj.weight_scale").retype_as(
                    "~.0.up_proj.weight",
                    Dtype::BF16,
                    &[1, 144, 136],
                )
            },
            "1 tensor whose shape does not fit its rule: `~.0.up_proj.weight` (expected [144, \
             136], got [1, 144, 136])",
        ),
        (
            MIMO,
            |t| t.each("~.0.down_proj.weight", |t, n| t.reshape(n, &[2, 2])),
            "1 scale of an impossible shape: `~.0.down_proj.weight_scale_inv` (expected [1, 1], \
             got [2, 2]: [2, 2] in blocks of 128x128)",
        ),
        (
            MIMO,
            |t| t.reshape("~.0.up_proj.weight_scale_inv", &[2, 1]),
            "1 scale of an impossible shape: `~.0.up_proj.weight_scale_inv` (expected [2, 2], \
             got [2, 1]: [144, 136] in blocks of 128x128)",
        ),
        (
            MIMO,
            |t| t.reshape("~.0.up_proj.weight_scale_inv", &[2, 2, 1]),
            "1 scale of an impossible shape: `~.0.up_proj.weight_scale_inv` (expected [2, 2], \
             got [2, 2, 1]: [144, 136] in blocks of 128x128)",
        ),
        (
            MIMO,
            |t| t.reshape("~.0.up_proj.weight_scale_inv", &[0]),
            "1 scale of an impossible shape: `~.0.up_proj.weight_scale_inv` (expected [2, 2], \
             got [0]: [144, 136] in blocks of 128x128)",
        ),
        (
            MIMO,
            |t| t.reshape("model.layers.0.self_attn.q_proj.weight_scale_inv", &[4, 2]),
            "1 scale of an impossible shape: `model.layers.0.self_attn.q_proj.weight_scale_inv` \
             (expected [6, 2], got [4, 2]: [768, 136] in blocks of 128x128)",
        ),
        (
            MIMO,
            |t| t.reshape("model.layers.0.self_attn.k_proj.weight_scale_inv", &[5, 2]),
            "1 scale of an impossible shape: `model.layers.0.self_attn.k_proj.weight_scale_inv` \
             (expected [3, 2] or the rows of fused shards, got [5, 2]: [384, 136] in blocks of \
             128x128)",
        ),
        (
            MIMO,
            |t| t.reshape("model.layers.0.self_attn.k_proj.weight_scale_inv", &[3, 1]),
            "1 scale of an impossible shape: `model.layers.0.self_attn.k_proj.weight_scale_inv` \
             (expected [3, 2] or the rows of fused shards, got [3, 1]: [384, 136] in blocks of \
             128x128)",
        ),
        (
            MIMO,
            |t| t.reshape("model.layers.0.self_attn.v_proj.weight_scale_inv", &[3, 2]),
            "2 scales of impossible shapes: `model.layers.0.self_attn.k_proj.weight_scale_inv` \
             (expected [3, 2] or the rows of fused shards, got [4, 2]: [384, 136] in blocks of \
             128x128), `model.layers.0.self_attn.v_proj.weight_scale_inv` (expected [2, 2] or \
             the rows of fused shards, got [3, 2]: [256, 136] in blocks of 128x128)",
        ),
        (
            MIMO,
            |t| t.reshape("model.layers.0.self_attn.v_proj.weight_scale_inv", &[2, 1]),
            "2 scales of impossible shapes: `model.layers.0.self_attn.k_proj.weight_scale_inv` \
             (expected [3, 2] or the rows of fused shards, got [4, 2]: [384, 136] in blocks of \
             128x128), `model.layers.0.self_attn.v_proj.weight_scale_inv` (expected [2, 2] or \
             the rows of fused shards, got [2, 1]: [256, 136] in blocks of 128x128)",
        ),
        (
            MIMO,
            |t| t.reshape("model.layers.0.self_attn.k_proj.weight", &[1 << 50, 0]),
            "1 payload of an impossible shape: `model.layers.0.self_attn.k_proj.weight` \
             (expected a matrix, got F8_E4M3 [1125899906842624, 0])",
        ),
        (
            MIMO,
            |t| t.reshape("model.norm.weight", &[0, 1 << 40, 1 << 40]),
            "`CKPT`: 1 of 3 shards cannot be used: `model-00002-of-00003.safetensors`: tensor \
             `model.norm.weight`: BF16 [0, 1099511627776, 1099511627776] is not a whole number of \
             bytes below 2^61",
        ),
        (
            MIMO,
            |t| t.reshape("model.norm.weight", &[1; 65]),
            "`CKPT`: 1 of 3 shards cannot be used: `model-00002-of-00003.safetensors`: tensor \
             `model.norm.weight`: expected at most 64 axes, got 65",
        ),
        (
            FLASH,
            |t| t.reshape("~.1.w1.weight", &[96, 81]),
            "1 scale of an impossible shape: `~.1.w1.scale` (expected [96, 6], got [96, 5]: \
             [96, 162] in blocks of 1x32)",
        ),
        (
            FLASH,
            |t| t.reshape("~.1.w1.weight", &[96 * 80]),
            "1 payload of an impossible shape: `~.1.w1.weight` (expected a matrix, got I8 \
             [7680])",
        ),
        (
            FLASH,
            |t| t.reshape("~.1.w2.scale", &[160, 2]),
            "1 scale of an impossible shape: `~.1.w2.scale` (expected [160, 3], got [160, 2]: \
             [160, 96] in blocks of 1x32)",
        ),
        (
            FLASH,
            |t| t.reshape("~.1.w1.scale", &[96, 4]),
            "1 scale of an impossible shape: `~.1.w1.scale` (expected [96, 5], got [96, 4]: \
             [96, 160] in blocks of 1x32)",
        ),
        (
            FLASH,
            |t| t.reshape("~.1.w1.scale", &[5, 96]),
            "1 scale of an impossible shape: `~.1.w1.scale` (expected [96, 5], got [5, 96]: \
             [96, 160] in blocks of 1x32)",
        ),
        (
            FLASH,
            |t| t.reshape("layers.1.attn.wq_b.scale", &[2, 1]),
            "1 scale of an impossible shape: `layers.1.attn.wq_b.scale` (expected [1, 1], got \
             [2, 1]: [128, 96] in blocks of 128x128)",
        ),
        (
            BASE,
            |t| t.reshape("~.1.w1.weight", &[145, 136]),
            "1 tensor whose shape does not fit its rule: `~.1.w1.weight` (expected [144, 136], \
             got [145, 136])",
        ),
        (
            BASE,
            |t| t.reshape("~.1.w1.scale", &[1, 2]),
            "1 scale of an impossible shape: `~.1.w1.scale` (expected [2, 2], got [1, 2]: [144, \
             136] in blocks of 128x128)",
        ),
        (
            KIMI,
            |t| t.reshape("~.1.up_proj.weight_packed", &[64, 11]),
            "1 tensor whose shape does not fit its rule: `~.1.up_proj.weight` (expected [64, \
             96], got [64, 88])",
        ),
        (
            KIMI,
            |t| t.reshape("~.1.up_proj.weight_packed", &[768]),
            "1 payload of an impossible shape: `~.1.up_proj.weight_packed` (expected a matrix, \
             got I32 [768])",
        ),
        (
            KIMI,
            |t| t.reshape("~.1.up_proj.weight_scale", &[64, 2]),
            "1 scale of an impossible shape: `~.1.up_proj.weight_scale` (expected [64, 3], got \
             [64, 2]: [64, 96] in blocks of 1x32)",
        ),
        (
            KIMI,
            |t| t.reshape("~.1.up_proj.weight_scale", &[3, 64]),
            "1 scale of an impossible shape: `~.1.up_proj.weight_scale` (expected [64, 3], got \
             [3, 64]: [64, 96] in blocks of 1x32)",
        ),
        (
            KIMI,
            |t| t.reshape("~.1.up_proj.weight_scale", &[63, 3]),
            "1 scale of an impossible shape: `~.1.up_proj.weight_scale` (expected [64, 3], got \
             [63, 3]: [64, 96] in blocks of 1x32)",
        ),
        (
            KIMI,
            |t| t.reshape("~.1.up_proj.weight_shape", &[3]),
            "1 shape tensor that holds no two integers: `~.1.up_proj.weight_shape` (expected \
             I32 or I64 [2], got I32 [3])",
        ),
        (
            QWEN,
            |t| t.reshape("~.gate_up_proj", &[4, 96, 79]),
            "1 tensor whose shape does not fit its rule: `~.gate_up_proj` (expected [4, 96, \
             80], got [4, 96, 79])",
        ),
        (
            QWEN,
            |t| t.reshape("~.gate_up_proj", &[4, 80, 96]),
            "1 tensor whose shape does not fit its rule: `~.gate_up_proj` (expected [4, 96, \
             80], got [4, 80, 96])",
        ),
        (
            QWEN,
            |t| t.reshape("~.down_proj", &[3, 40, 96]),
            "1 tensor whose shape does not fit its rule: `~.down_proj` (expected [4, 40, 96], \
             got [3, 40, 96])",
        ),
        (
            QWEN,
            |t| t.reshape("~.down_proj", &[4, 40, 0]),
            "1 tensor whose shape does not fit its rule: `~.down_proj` (expected [4, 40, 96], \
             got [4, 40, 0])",
        ),
    ];
    assert_refused(Toy::golden, cases);
}
