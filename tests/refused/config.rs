//! A config.json that contradicts the files.

use mount_ckpt::PlanOptions;
use serde_json::json;

use crate::common::toy::Toy;
use crate::{BASE, Case, FLASH, KIMI, MIMO, QWEN, assert_refused};

#[test]
fn a_config_that_contradicts_the_files_is_refused() {
    let cases: &[Case] = &[
        (
            MIMO,
            |t| t.set("n_routed_experts", 2),
            "6 tensors that no rule of the mapping takes: \
             `~.2.down_proj.weight`, `~.2.gate_proj.weight`, `~.2.up_proj.weight`, \
             `model.layers.2.mlp.experts.2.down_proj.weight`, \
             `model.layers.2.mlp.experts.2.gate_proj.weight` and 1 more",
        ),
        (
            MIMO,
            |t| t.set("n_routed_experts", 5),
            "12 missing tensors: `~.3.gate_proj.weight` (for `~.gate_and_up_projs`), \
             `~.3.up_proj.weight` (for `~.gate_and_up_projs`), `~.4.gate_proj.weight` (for \
             `~.gate_and_up_projs`), `~.4.up_proj.weight` (for `~.gate_and_up_projs`), \
             `model.layers.2.mlp.experts.3.gate_proj.weight` (for \
             `model.layers.2.mlp.experts.gate_and_up_projs`) and 7 more",
        ),
        (
            MIMO,
            |t| t.set("n_routed_experts", 1u64 << 60),
            "6917529027641081838 missing tensors: `~.3.gate_proj.weight` (for \
             `~.gate_and_up_projs`), `~.3.up_proj.weight` (for `~.gate_and_up_projs`), \
             `~.4.gate_proj.weight` (for `~.gate_and_up_projs`), `~.4.up_proj.weight` (for \
             `~.gate_and_up_projs`), `~.5.gate_proj.weight` (for `~.gate_and_up_projs`) and \
             6917529027641081833 more",
        ),
        (
            MIMO,
            |t| t.set("n_routed_experts", "3"),
            "config.json has no integer `n_routed_experts`, which the mapping needs",
        ),
        (
            MIMO,
            |t| t.unset("n_routed_experts"),
            "config.json has no integer `n_routed_experts`, which the mapping needs",
        ),
        (
            MIMO,
            |t| t.set("num_hidden_layers", 1),
            "35 tensors that no rule of the mapping takes: \
             `model.layers.1.input_layernorm.weight`, `~.0.down_proj.weight`, \
             `~.0.gate_proj.weight`, `~.0.up_proj.weight`, `~.1.down_proj.weight` and 30 more",
        ),
        (
            MIMO,
            |t| t.set("num_hidden_layers", 4),
            "1 missing layer: `model.layers.3` (by config.json there are 4)",
        ),
        (
            MIMO,
            |t| t.set("num_hidden_layers", 1u64 << 60),
            "1152921504606846973 missing layers: `model.layers.3` (by config.json there are \
             1152921504606846976), `model.layers.4` (by config.json there are \
             1152921504606846976), `model.layers.5` (by config.json there are \
             1152921504606846976), `model.layers.6` (by config.json there are \
             1152921504606846976), `model.layers.7` (by config.json there are 1152921504606846976) \
             and 1152921504606846968 more",
        ),
        (
            MIMO,
            |t| t.set("moe_intermediate_size", 128),
            "18 tensors whose shapes do not fit their rules: `~.0.gate_proj.weight` (expected \
             [128, 136], got [144, 136]), `~.1.gate_proj.weight` (expected [128, 136], got [144, \
             136]), `~.2.gate_proj.weight` (expected [128, 136], got [144, 136]), \
             `~.0.up_proj.weight` (expected [128, 136], got [144, 136]), `~.1.up_proj.weight` \
             (expected [128, 136], got [144, 136]) and 13 more",
        ),
        (
            MIMO,
            |t| t.set("quantization_config.weight_block_size", 128),
            "config.json: `quantization_config.weight_block_size`: expected two integers above \
             0, got `128`",
        ),
        (
            MIMO,
            |t| t.set("quantization_config.weight_block_size", json!([64, 64])),
            "42 scales of impossible shapes: `model.layers.0.self_attn.k_proj.weight_scale_inv` \
             (expected [6, 3] or the rows of fused shards, got [4, 2]: [384, 136] in blocks of \
             64x64), `model.layers.0.self_attn.v_proj.weight_scale_inv` (expected [4, 3] or the \
             rows of fused shards, got [2, 2]: [256, 136] in blocks of 64x64), \
             `model.layers.1.self_attn.k_proj.weight_scale_inv` (expected [12, 3] or the rows of \
             fused shards, got [6, 2]: [768, 136] in blocks of 64x64), \
             `model.layers.1.self_attn.v_proj.weight_scale_inv` (expected [8, 3] or the rows of \
             fused shards, got [4, 2]: [512, 136] in blocks of 64x64), \
             `model.layers.2.self_attn.k_proj.weight_scale_inv` (expected [6, 3] or the rows of \
             fused shards, got [4, 2]: [384, 136] in blocks of 64x64) and 37 more",
        ),
        (
            MIMO,
            |t| t.configure(json!({})),
            "config.json has no integer `num_key_value_heads`, which the mapping needs",
        ),
        (
            FLASH,
            |t| t.set("n_routed_experts", 2),
            "15 tensors that no rule of the mapping takes: \
             `layers.0.ffn.experts.2.w1.weight`, `layers.0.ffn.experts.2.w2.weight`, \
             `layers.0.ffn.experts.2.w3.weight`, `~.2.w1.weight`, `~.2.w2.weight` and 10 more",
        ),
        (
            FLASH,
            |t| t.set("num_hidden_layers", 3),
            "30 names that two tensors land on: `mtp.0.attn.attn_sink` (`layers.3.attn.attn_sink` \
             and `mtp.0.attn.attn_sink`), `mtp.0.attn.kv_norm.weight` \
             (`layers.3.attn.kv_norm.weight` and `mtp.0.attn.kv_norm.weight`), \
             `mtp.0.attn.q_norm.weight` (`layers.3.attn.q_norm.weight` and \
             `mtp.0.attn.q_norm.weight`), `mtp.0.attn.wkv.weight` (`layers.3.attn.wkv.weight` and \
             `mtp.0.attn.wkv.weight`), `mtp.0.attn.wo_a.weight` (`layers.3.attn.wo_a.weight` and \
             `mtp.0.attn.wo_a.weight`) and 25 more",
        ),
        (
            FLASH,
            |t| t.set("num_hidden_layers", 6),
            "2 missing layers: `layers.4` (by config.json there are 6), `layers.5` (by \
             config.json there are 6)",
        ),
        (
            FLASH,
            |t| t.unset("num_hidden_layers"),
            "config.json has no integer `num_hidden_layers`, which the mapping needs",
        ),
        (
            BASE,
            |t| t.set("n_routed_experts", 4),
            "15 missing tensors: `layers.0.ffn.experts.3.w1.weight` (for \
             `model.layers.0.mlp.experts.gate_and_up_projs`), `layers.0.ffn.experts.3.w3.weight` \
             (for `model.layers.0.mlp.experts.gate_and_up_projs`), `~.3.w1.weight` (for \
             `model.layers.1.mlp.experts.gate_and_up_projs`), `~.3.w3.weight` (for \
             `model.layers.1.mlp.experts.gate_and_up_projs`), `layers.2.ffn.experts.3.w1.weight` \
             (for `model.layers.2.mlp.experts.gate_and_up_projs`) and 10 more",
        ),
        (
            KIMI,
            |t| t.set("text_config.n_routed_experts", 2),
            "3 tensors that no rule of the mapping takes: \
             `~.2.down_proj.weight`, `~.2.gate_proj.weight`, `~.2.up_proj.weight`",
        ),
        (
            KIMI,
            |t| t.set("text_config.n_routed_experts", 4),
            "3 missing tensors: `~.3.gate_proj.weight` (for `model.~.gate_and_up_projs`), \
             `~.3.up_proj.weight` (for `model.~.gate_and_up_projs`), `~.3.down_proj.weight` \
             (for `model.~.down_projs`)",
        ),
        (
            KIMI,
            |t| t.set("text_config.num_hidden_layers", 1),
            "23 tensors that no rule of the mapping takes: \
             `language_model.model.layers.1.input_layernorm.weight`, `~.0.down_proj.weight`, \
             `~.0.gate_proj.weight`, `~.0.up_proj.weight`, `~.1.down_proj.weight` and 18 more",
        ),
        (
            KIMI,
            |t| t.unset("text_config.n_routed_experts"),
            "config.json has no integer `n_routed_experts`, which the mapping needs",
        ),
        (
            KIMI,
            |t| {
                t.set(
                    "text_config.quantization_config.config_groups.group_0.weights.group_size",
                    48,
                )
            },
            "6 scales of impossible shapes: `~.0.gate_proj.weight_scale` (expected [64, 2], got \
             [64, 3]: [64, 96] in blocks of 1x48), `~.0.up_proj.weight_scale` (expected [64, \
             2], got [64, 3]: [64, 96] in blocks of 1x48), `~.1.gate_proj.weight_scale` \
             (expected [64, 2], got [64, 3]: [64, 96] in blocks of 1x48), \
             `~.1.up_proj.weight_scale` (expected [64, 2], got [64, 3]: [64, 96] in blocks of \
             1x48), `~.2.gate_proj.weight_scale` (expected [64, 2], got [64, 3]: [64, 96] in \
             blocks of 1x48) and 1 more",
        ),
        (
            QWEN,
            |t| t.set("text_config.num_experts", 3),
            "4 tensors whose shapes do not fit their rules: \
             `model.language_model.layers.0.mlp.experts.gate_up_proj` (expected [3, 96, 80], \
             got [4, 96, 80]), `~.gate_up_proj` (expected [3, 96, 80], got [4, 96, 80]), \
             `model.language_model.layers.0.mlp.experts.down_proj` (expected [3, 40, 96], got \
             [4, 40, 96]), `~.down_proj` (expected [3, 40, 96], got [4, 40, 96])",
        ),
        (
            QWEN,
            |t| t.set("text_config.num_experts", 5),
            "4 tensors whose shapes do not fit their rules: \
             `model.language_model.layers.0.mlp.experts.gate_up_proj` (expected [5, 96, 80], \
             got [4, 96, 80]), `~.gate_up_proj` (expected [5, 96, 80], got [4, 96, 80]), \
             `model.language_model.layers.0.mlp.experts.down_proj` (expected [5, 40, 96], got \
             [4, 40, 96]), `~.down_proj` (expected [5, 40, 96], got [4, 40, 96])",
        ),
        (
            QWEN,
            |t| t.set("text_config.num_hidden_layers", 1),
            "11 tensors that no rule of the mapping takes: \
             `model.language_model.layers.1.input_layernorm.weight`, `~.down_proj`, \
             `~.gate_up_proj`, `model.language_model.layers.1.mlp.gate.weight`, \
             `model.language_model.layers.1.post_attention_layernorm.weight` and 6 more",
        ),
        (
            QWEN,
            |t| t.unset("text_config.moe_intermediate_size"),
            "config.json has no integer `moe_intermediate_size`, which the mapping needs",
        ),
    ];
    assert_refused(Toy::golden, cases);
}

/// Regression: a checkpoint of a few KiB, a sparse shard with as many experts as config.json
/// states. The plan took more than 9 GB, and the process was killed.
#[test]
fn a_tensor_with_millions_of_experts_is_refused() {
    const EXPERTS: u64 = 20_000_000;
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": EXPERTS,
        "hidden_size": 1, "moe_intermediate_size": 1,
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let experts = "model.layers.0.mlp.experts";
    let (gate_and_up, down) = (4 * EXPERTS, 6 * EXPERTS);
    let header = json!({
        format!("{experts}.gate_and_up_projs"):
            {"dtype": "BF16", "shape": [EXPERTS, 1, 2], "data_offsets": [0, gate_and_up]},
        format!("{experts}.down_projs"):
            {"dtype": "BF16", "shape": [EXPERTS, 1, 1], "data_offsets": [gate_and_up, down]},
    })
    .to_string();
    let path = dir.path().join("model.safetensors");
    let length = u64::try_from(header.len()).unwrap();
    std::fs::write(&path, [&length.to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(8 + length + down).unwrap();

    let options = PlanOptions::default();
    let message = crate::common::plan("qwen3-moe", dir.path(), &options).unwrap_err().to_string();
    let expected = "2 tensors of more pieces than any model's: \
                    `model.layers.0.mlp.experts.gate_and_up_projs` (expected at most 65536, got \
                    40000000), `model.layers.0.mlp.experts.down_projs` (expected at most 65536, \
                    got 20000000)";
    assert!(message.ends_with(expected), "{message}");
}
