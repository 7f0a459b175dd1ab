//! The native layout with something wrong, mounted in the published layout.

use mount_ckpt::{PlanOptions, Quantize};
use safetensors::Dtype;

use crate::common::toy::Toy;
use crate::{BASE, Case, FLASH, KIMI, MIMO, QWEN, assert_refused, refusal};

#[test]
fn damaged_native_checkpoints_are_refused_with_the_same_messages() {
    let cases: &[Case] = &[
        (
            MIMO,
            |t| t.drop("~.down_projs"),
            "3 missing tensors: `~.0.down_proj.weight` (for `~.down_projs`), \
             `~.1.down_proj.weight` (for `~.down_projs`), `~.2.down_proj.weight` (for \
             `~.down_projs`)",
        ),
        (
            MIMO,
            |t| t.drop("~.gate_and_up_projs"),
            "6 missing tensors: `~.0.gate_proj.weight` (for `~.gate_and_up_projs`), \
             `~.0.up_proj.weight` (for `~.gate_and_up_projs`), `~.1.gate_proj.weight` (for \
             `~.gate_and_up_projs`), `~.1.up_proj.weight` (for `~.gate_and_up_projs`), \
             `~.2.gate_proj.weight` (for `~.gate_and_up_projs`) and 1 more",
        ),
        (
            MIMO,
            |t| t.reshape("~.down_projs", &[2, 144, 136]),
            "1 tensor whose shape does not fit its rule: `~.down_projs` (axis 0 of [2, 144, \
             136] cannot be cut into 3 equal parts)",
        ),
        (
            MIMO,
            |t| t.reshape("~.down_projs", &[3, 144, 150]),
            "1 tensor whose shape does not fit its rule: `~.down_projs` (expected parts of \
             [136, 144], got [150, 144])",
        ),
        (
            MIMO,
            |t| t.reshape("~.gate_and_up_projs", &[3, 136, 287]),
            "1 tensor whose shape does not fit its rule: `~.gate_and_up_projs` (axis 1 of [136, \
             287] cannot be cut into 2 equal parts)",
        ),
        (
            MIMO,
            |t| t.retype("~.down_projs", Dtype::I16),
            "1 tensor whose dtype does not fit its rule: `~.down_projs` (expected a quantized \
             matrix, BF16, F16 or F32, got I16)",
        ),
        (
            MIMO,
            |t| t.add("~.0.gate_proj.weight", Dtype::BF16, &[144, 136]),
            "1 tensor that no rule of the mapping takes: \
             `~.0.gate_proj.weight`",
        ),
        (
            MIMO,
            |t| t.reshape("~.down_projs", &[3, 0, 136]),
            "1 tensor whose shape does not fit its rule: `~.down_projs` (expected elements, got \
             [3, 0, 136])",
        ),
        (
            MIMO,
            |t| t.set("n_routed_experts", 1u64 << 40).reshape("~.down_projs", &[1 << 40, 0, 1]),
            "4 tensors whose shapes do not fit their rules: `~.gate_and_up_projs` (axis 0 of [3, \
             136, 288] cannot be cut into 1099511627776 equal parts), \
             `model.layers.2.mlp.experts.gate_and_up_projs` (axis 0 of [3, 136, 288] cannot be cut \
             into 1099511627776 equal parts), `~.down_projs` (expected elements, got \
             [1099511627776, 0, 1]), `model.layers.2.mlp.experts.down_projs` (axis 0 of [3, 144, \
             136] cannot be cut into 1099511627776 equal parts)",
        ),
        (
            MIMO,
            |t| t.drop_all("layers.0."),
            "2 missing layers: `model.layers.0` (by config.json there are 3), `model.mtp.layers.0` \
             (others follow)",
        ),
        (
            FLASH,
            |t| t.drop("model.layers.1.mlp.experts.down_projs"),
            "3 missing tensors: `~.0.w2.weight` (for `model.layers.1.mlp.experts.down_projs`), \
             `~.1.w2.weight` (for `model.layers.1.mlp.experts.down_projs`), `~.2.w2.weight` \
             (for `model.layers.1.mlp.experts.down_projs`)",
        ),
        (
            FLASH,
            |t| t.add("mtp.layers.0.surplus.weight", Dtype::BF16, &[4]),
            "1 tensor that no rule of the mapping takes: \
             `mtp.layers.0.surplus.weight`",
        ),
        (
            FLASH,
            |t| {
                t.copy(
                    "model.layers.0.self_attn.sinks_param.weight",
                    "model.layers.0.self_attn.attn_sink",
                )
            },
            "1 name that two tensors land on: `layers.0.attn.attn_sink` \
             (`model.layers.0.self_attn.sinks_param.weight` and \
             `model.layers.0.self_attn.attn_sink`)",
        ),
        (
            BASE,
            |t| t.reshape("model.layers.1.mlp.experts.down_projs", &[4, 144, 136]),
            "1 tensor whose shape does not fit its rule: \
             `model.layers.1.mlp.experts.down_projs` (axis 0 of [4, 144, 136] cannot be cut \
             into 3 equal parts)",
        ),
        (
            KIMI,
            |t| t.drop("model.~.down_projs"),
            "3 missing tensors: `~.0.down_proj.weight` (for `model.~.down_projs`), \
             `~.1.down_proj.weight` (for `model.~.down_projs`), `~.2.down_proj.weight` (for \
             `model.~.down_projs`)",
        ),
        (
            KIMI,
            |t| t.retype("model.~.gate_and_up_projs", Dtype::F8_E4M3),
            "1 tensor whose dtype does not fit its rule: `model.~.gate_and_up_projs` (expected \
             a quantized matrix, BF16, F16 or F32, got F8_E4M3)",
        ),
        (QWEN, |t| t.drop("~.down_projs"), "1 missing tensor: `~.down_proj` (for `~.down_projs`)"),
        (
            QWEN,
            |t| t.reshape("~.down_projs", &[4, 96, 40]),
            "1 tensor whose shape does not fit its rule: `~.down_projs` (expected parts of [4, \
             40, 96], got [4, 96, 40])",
        ),
    ];
    assert_refused(Toy::native, cases);
}

#[test]
fn integer_tensors_cannot_be_quantized() {
    let mut toy = Toy::native(MIMO);
    toy.retype("~.down_projs", Dtype::I16);
    let quantize = Some(Quantize::default());
    let options = PlanOptions { quantize, ..PlanOptions::default() };
    assert_eq!(
        refusal(&toy, &options, |_| {}),
        "1 tensor whose dtype does not fit its rule: `~.down_projs` (expected a quantized matrix, \
         BF16, F16 or F32, got I16)"
    );
}
