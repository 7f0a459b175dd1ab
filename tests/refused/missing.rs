//! Tensors that are missing, duplicated, or without a rule.

use mount_ckpt::{LayoutName, PlanOptions, Unmapped};
use safetensors::Dtype;

use crate::common::toy::Toy;
use crate::{BASE, Case, FLASH, KIMI, MIMO, QWEN, assert_refused, refusal};

#[test]
fn parts_that_are_missing_are_named_with_what_needs_them() {
    let cases: &[Case] = &[
        (
            MIMO,
            |t| t.drop("~.0.gate_proj.weight").drop("~.0.gate_proj.weight_scale_inv"),
            "1 missing tensor: `~.0.gate_proj.weight` (for `~.gate_and_up_projs`)",
        ),
        (
            MIMO,
            |t| t.drop_all("~.1."),
            "3 missing tensors: `~.1.gate_proj.weight` (for `~.gate_and_up_projs`), \
             `~.1.up_proj.weight` (for `~.gate_and_up_projs`), `~.1.down_proj.weight` (for \
             `~.down_projs`)",
        ),
        (
            MIMO,
            |t| t.drop_all("down_proj").drop_all("~.0."),
            "8 missing tensors: `~.0.gate_proj.weight` (for `~.gate_and_up_projs`), \
             `~.0.up_proj.weight` (for `~.gate_and_up_projs`), `~.0.down_proj.weight` (for \
             `~.down_projs`), `~.1.down_proj.weight` (for `~.down_projs`), `~.2.down_proj.weight` \
             (for `~.down_projs`) and 3 \
             more; 3 missing tensors that the model needs: \
             `model.layers.0.mlp.down_proj.weight` (of its layer), \
             `model.mtp.layers.0.mlp.down_proj.weight` (of its layer), \
             `model.mtp.layers.1.mlp.down_proj.weight` (of its layer)",
        ),
        (
            MIMO,
            |t| t.drop("~.0.gate_proj.weight"),
            "1 part of a quantized matrix without its payload: `~.0.gate_proj.weight_scale_inv` \
             (`~.0.gate_proj.weight` is missing)",
        ),
        (
            MIMO,
            |t| t.drop("~.0.gate_proj.weight_scale_inv"),
            "1 missing scale: `~.0.gate_proj.weight_scale_inv` (for `~.0.gate_proj.weight`, \
             which is F8_E4M3)",
        ),
        (
            MIMO,
            |t| t.drop_all("scale_inv"),
            "42 missing scales: `model.layers.0.self_attn.k_proj.weight_scale_inv` (for \
             `model.layers.0.self_attn.k_proj.weight`, which is F8_E4M3), \
             `model.layers.0.self_attn.v_proj.weight_scale_inv` (for \
             `model.layers.0.self_attn.v_proj.weight`, which is F8_E4M3), \
             `model.layers.1.self_attn.k_proj.weight_scale_inv` (for \
             `model.layers.1.self_attn.k_proj.weight`, which is F8_E4M3), \
             `model.layers.1.self_attn.v_proj.weight_scale_inv` (for \
             `model.layers.1.self_attn.v_proj.weight`, which is F8_E4M3), \
             `model.layers.2.self_attn.k_proj.weight_scale_inv` (for \
             `model.layers.2.self_attn.k_proj.weight`, which is F8_E4M3) and 37 more",
        ),
        (
            MIMO,
            |t| t.drop("model.layers.0.self_attn.v_proj.weight_scale_inv"),
            "1 missing scale: `model.layers.0.self_attn.v_proj.weight_scale_inv` (for \
             `model.layers.0.self_attn.v_proj.weight`, which is F8_E4M3)",
        ),
        (
            MIMO,
            |t| t.drop("model.layers.0.self_attn.v_proj.weight"),
            "1 missing tensor: `model.layers.0.self_attn.v_proj.weight` (for \
             `model.layers.0.self_attn.k_proj.weight`, which was quantized with it); 1 part of \
             a quantized matrix without its payload: \
             `model.layers.0.self_attn.v_proj.weight_scale_inv` \
             (`model.layers.0.self_attn.v_proj.weight` is missing)",
        ),
        (
            MIMO,
            |t| t.drop_all("model.layers.0.self_attn.v_proj"),
            "1 missing tensor: `model.layers.0.self_attn.v_proj.weight` (for \
             `model.layers.0.self_attn.k_proj.weight`, which was quantized with it)",
        ),
        (
            MIMO,
            |t| t.drop_all("model.layers.0.self_attn.k_proj"),
            "1 missing tensor: `model.layers.0.self_attn.k_proj.weight` (for \
             `model.layers.0.self_attn.v_proj.weight`, which was quantized with it)",
        ),
        (
            MIMO,
            |t| t.drop("model.layers.0.mlp.up_proj.weight"),
            "1 part of a quantized matrix without its payload: \
             `model.layers.0.mlp.up_proj.weight_scale_inv` (`model.layers.0.mlp.up_proj.weight` \
             is missing)",
        ),
        (
            MIMO,
            |t| t.drop_all("layers.0."),
            "2 missing layers: `model.layers.0` (by config.json there are 3), `model.mtp.layers.0` \
             (others follow)",
        ),
        (
            FLASH,
            |t| t.drop("~.1.w3.scale"),
            "1 missing scale: `~.1.w3.scale` (for `~.1.w3.weight`, which is I8)",
        ),
        (
            FLASH,
            |t| t.drop("~.1.w3.weight"),
            "1 part of a quantized matrix without its payload: `~.1.w3.scale` (`~.1.w3.weight` \
             is missing)",
        ),
        (
            FLASH,
            |t| t.drop_all("~.1.w3."),
            "1 missing tensor: `~.1.w3.weight` (for \
             `model.layers.1.mlp.experts.gate_and_up_projs`)",
        ),
        (
            FLASH,
            |t| t.drop_all("mtp.0.ffn.experts.1.w2."),
            "1 missing tensor: `mtp.0.ffn.experts.1.w2.weight` (for \
             `mtp.layers.0.mlp.experts.down_projs`)",
        ),
        (
            FLASH,
            |t| t.drop("mtp.0.e_proj.scale"),
            "1 missing scale: `mtp.0.e_proj.scale` (for `mtp.0.e_proj.weight`, which is \
             F8_E4M3)",
        ),
        (
            BASE,
            |t| t.drop("~.2.w1.scale"),
            "1 missing scale: `~.2.w1.scale` (for `~.2.w1.weight`, which is F8_E4M3)",
        ),
        (
            BASE,
            |t| t.drop("~.2.w1.weight"),
            "1 part of a quantized matrix without its payload: `~.2.w1.scale` (`~.2.w1.weight` \
             is missing)",
        ),
        (
            BASE,
            |t| t.drop_all("~.2."),
            "3 missing tensors: `~.2.w1.weight` (for \
             `model.layers.1.mlp.experts.gate_and_up_projs`), `~.2.w3.weight` (for \
             `model.layers.1.mlp.experts.gate_and_up_projs`), `~.2.w2.weight` (for \
             `model.layers.1.mlp.experts.down_projs`)",
        ),
        (
            KIMI,
            |t| t.drop("~.1.up_proj.weight_packed"),
            "1 part of a quantized matrix without its payload: `~.1.up_proj.weight_scale` \
             (`~.1.up_proj.weight_packed` is missing)",
        ),
        (
            KIMI,
            |t| t.drop("~.1.up_proj.weight_scale"),
            "1 missing scale: `~.1.up_proj.weight_scale` (for `~.1.up_proj.weight_packed`, \
             which is I32)",
        ),
        (
            KIMI,
            |t| t.drop("~.1.up_proj.weight_shape"),
            "1 missing tensor: `~.1.up_proj.weight_shape` (for `~.1.up_proj.weight_packed`)",
        ),
        (
            KIMI,
            |t| t.drop_all("weight_packed"),
            "9 parts of quantized matrices without their payloads: `~.0.down_proj.weight_scale` \
             (`~.0.down_proj.weight_packed` is missing), `~.0.gate_proj.weight_scale` \
             (`~.0.gate_proj.weight_packed` is missing), `~.0.up_proj.weight_scale` \
             (`~.0.up_proj.weight_packed` is missing), `~.1.down_proj.weight_scale` \
             (`~.1.down_proj.weight_packed` is missing), `~.1.gate_proj.weight_scale` \
             (`~.1.gate_proj.weight_packed` is missing) and 4 more",
        ),
        (
            KIMI,
            |t| t.drop_all("~.1.up_proj."),
            "1 missing tensor: `~.1.up_proj.weight` (for `model.~.gate_and_up_projs`)",
        ),
        (
            QWEN,
            |t| t.drop("~.gate_up_proj"),
            "1 missing tensor: `~.gate_up_proj` (for `~.gate_and_up_projs`)",
        ),
        (
            QWEN,
            |t| t.drop_all("language_model.layers.1."),
            "1 missing layer: `model.language_model.layers.1` (by config.json there are 2)",
        ),
    ];
    assert_refused(Toy::golden, cases);
}

#[test]
fn names_that_no_rule_takes_are_refused() {
    let cases: &[Case] = &[
        (
            MIMO,
            |t| t.rename_all("~.2.", "~.3."),
            "3 tensors that no rule of the mapping takes: \
             `~.3.down_proj.weight`, `~.3.gate_proj.weight`, `~.3.up_proj.weight`; 3 missing \
             tensors: `~.2.gate_proj.weight` (for `~.gate_and_up_projs`), `~.2.up_proj.weight` \
             (for `~.gate_and_up_projs`), `~.2.down_proj.weight` (for `~.down_projs`)",
        ),
        (
            MIMO,
            |t| t.rename_all("model.layers.1.", "model.layers.01."),
            "18 tensors that no rule of the mapping takes: \
             `model.layers.01.input_layernorm.weight`, \
             `model.layers.01.mlp.experts.0.down_proj.weight`, \
             `model.layers.01.mlp.experts.0.gate_proj.weight`, \
             `model.layers.01.mlp.experts.0.up_proj.weight`, \
             `model.layers.01.mlp.experts.1.down_proj.weight` and 13 more; 1 missing layer: \
             `model.layers.1` (by config.json there are 3)",
        ),
        (
            MIMO,
            |t| t.rename_all("model.", "transformer."),
            "74 tensors that no rule of the mapping takes: \
             `transformer.embed_tokens.weight`, `transformer.layers.0.input_layernorm.weight`, \
             `transformer.layers.0.mlp.down_proj.weight`, \
             `transformer.layers.0.mlp.gate_proj.weight`, \
             `transformer.layers.0.mlp.up_proj.weight` and 69 more",
        ),
        (
            MIMO,
            |t| t.rename_all("model.", "transformer.").drop_all("_proj").drop_all("lm_head"),
            "the checkpoint's names fit no layout of `mimo-v2-flash`: none of its 25 tensors is \
             one that the mapping renames or groups",
        ),
        (
            MIMO,
            |t| t.add("~.0.gate_proj.bias", Dtype::BF16, &[144]),
            "1 tensor that no rule of the mapping takes: \
             `~.0.gate_proj.bias`",
        ),
        (
            MIMO,
            |t| t.add("~.gate_and_up_projs", Dtype::BF16, &[3, 136, 288]),
            "1 tensor that no rule of the mapping takes: \
             `~.gate_and_up_projs`",
        ),
        (
            MIMO,
            |t| t.add("surplus", Dtype::BF16, &[144]),
            "1 tensor that no rule of the mapping takes: \
             `surplus`",
        ),
        (
            FLASH,
            |t| t.rename_all("~.2.", "~.3."),
            "3 tensors that no rule of the mapping takes: \
             `~.3.w1.weight`, `~.3.w2.weight`, `~.3.w3.weight`; 3 missing tensors: \
             `~.2.w1.weight` (for `model.layers.1.mlp.experts.gate_and_up_projs`), \
             `~.2.w3.weight` (for `model.layers.1.mlp.experts.gate_and_up_projs`), \
             `~.2.w2.weight` (for `model.layers.1.mlp.experts.down_projs`)",
        ),
        (
            FLASH,
            |t| t.add("~.0.w1.bias", Dtype::BF16, &[96]),
            "1 tensor that no rule of the mapping takes: \
             `~.0.w1.bias`",
        ),
        (
            FLASH,
            |t| t.add("layers.1.ffn.surplus.weight", Dtype::BF16, &[96]),
            "1 tensor that no rule of the mapping takes: \
             `layers.1.ffn.surplus.weight`",
        ),
        (
            FLASH,
            |t| t.copy("embed.weight", "model.embed_tokens.weight"),
            "1 name that two tensors land on: `embed.weight` (`embed.weight` and \
             `model.embed_tokens.weight`)",
        ),
        (
            BASE,
            |t| t.rename_all("~.2.", "~.3."),
            "3 tensors that no rule of the mapping takes: \
             `~.3.w1.weight`, `~.3.w2.weight`, `~.3.w3.weight`; 3 missing tensors: \
             `~.2.w1.weight` (for `model.layers.1.mlp.experts.gate_and_up_projs`), \
             `~.2.w3.weight` (for `model.layers.1.mlp.experts.gate_and_up_projs`), \
             `~.2.w2.weight` (for `model.layers.1.mlp.experts.down_projs`)",
        ),
        (
            KIMI,
            |t| t.rename_all("~.2.", "~.3."),
            "3 tensors that no rule of the mapping takes: \
             `~.3.down_proj.weight`, `~.3.gate_proj.weight`, `~.3.up_proj.weight`; 3 missing \
             tensors: `~.2.gate_proj.weight` (for `model.~.gate_and_up_projs`), \
             `~.2.up_proj.weight` (for `model.~.gate_and_up_projs`), `~.2.down_proj.weight` \
             (for `model.~.down_projs`)",
        ),
        (
            KIMI,
            |t| t.add("language_model.model.surplus", Dtype::BF16, &[4]),
            "1 tensor that no rule of the mapping takes: \
             `language_model.model.surplus`",
        ),
        (
            QWEN,
            |t| t.add("~.gate_and_up_projs", Dtype::BF16, &[4, 96, 80]),
            "1 tensor that no rule of the mapping takes: \
             `~.gate_and_up_projs`",
        ),
        (
            QWEN,
            |t| t.add("~.bias", Dtype::BF16, &[4]),
            "1 tensor that no rule of the mapping takes: \
             `~.bias`",
        ),
    ];
    assert_refused(Toy::golden, cases);
}

#[test]
fn two_tensors_with_the_same_target_name_are_refused() {
    let cases: &[Case] = &[
        (
            FLASH,
            |t| t.copy("mtp.0.enorm.weight", "layers.4.enorm.weight"),
            "1 name that two tensors land on: `mtp.0.enorm.weight` (`layers.4.enorm.weight` and \
             `mtp.0.enorm.weight`)",
        ),
        (
            FLASH,
            |t| t.copy("mtp.0.enorm.weight", "model.layers.4.enorm.weight"),
            "1 name that two tensors land on: `mtp.0.enorm.weight` \
             (`model.layers.4.enorm.weight` and `mtp.0.enorm.weight`)",
        ),
        (
            FLASH,
            |t| {
                t.copy("mtp.0.e_proj.weight", "layers.4.e_proj.weight")
                    .copy("mtp.0.e_proj.scale", "layers.4.e_proj.scale")
            },
            "1 name that two tensors land on: `mtp.0.e_proj.weight` (`layers.4.e_proj.weight` \
             and `mtp.0.e_proj.weight`)",
        ),
        (
            KIMI,
            |t| t.add("~.1.up_proj.weight", Dtype::BF16, &[64, 96]),
            "1 name that two tensors land on: `~.1.up_proj.weight` (`~.1.up_proj.weight` and \
             `~.1.up_proj.weight_packed`)",
        ),
        (
            KIMI,
            |t| t.copy("mm_projector.proj.0.weight", "mm_projector.linear_1.weight"),
            "1 name that two tensors land on: `model.multi_modal_projector.linear_1.weight` \
             (`mm_projector.proj.0.weight` and `mm_projector.linear_1.weight`)",
        ),
    ];
    assert_refused(Toy::golden, cases);
}

#[test]
fn hf_views_are_checked_for_missing_experts() {
    let mut toy = Toy::golden(MIMO);
    toy.drop_all("~.1.up_proj.");
    let options = PlanOptions { to: Some(LayoutName::Hf), ..PlanOptions::default() };
    assert_eq!(
        refusal(&toy, &options, |_| {}),
        "1 missing tensor: `~.1.up_proj.weight` (for `~.gate_and_up_projs`)"
    );
}

#[test]
fn unmapped_tensors_may_be_kept_or_dropped() {
    let mut toy = Toy::golden(MIMO);
    toy.add("surplus", Dtype::BF16, &[4]);
    for (unmapped, what) in [(Unmapped::Keep, "kept"), (Unmapped::Drop, "dropped")] {
        let options = PlanOptions { unmapped, ..PlanOptions::default() };
        let mounted = toy.mount(&options, |_| {}).unwrap();
        assert_eq!(mounted.engine.plan().summary.unmapped, Some((what, 1)));
    }
}
