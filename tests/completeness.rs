//! Tensors that a model needs are reported if they are missing. Tensors that releases, or copies of
//! them, leave out are not required.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use common::toy::{Toy, shard_name};
use common::{FAMILIES, plan};
use mount_ckpt::{LayoutName, PlanOptions, Unmapped};
use safetensors::Dtype;
use serde_json::{Value, json};

const LAYOUTS: [LayoutName; 3] = [LayoutName::Hf, LayoutName::Native, LayoutName::Transformers];

fn to(layout: LayoutName) -> PlanOptions {
    PlanOptions { to: Some(layout), ..PlanOptions::default() }
}

/// The matrix that a payload, scale or shape tensor belongs to; other names unchanged.
fn matrix_of(name: &str, names: &BTreeSet<&str>) -> String {
    let ends = ["_scale_inv", "_packed", "_scale", "_shape", "_blocks", "_scales"];
    let of_weight = |m: &&str| m.ends_with(".weight") || m.ends_with("_proj");
    if let Some(matrix) = ends.iter().find_map(|e| name.strip_suffix(e)).filter(of_weight) {
        return matrix.to_owned();
    }
    let weight = name.strip_suffix(".scale").map(|m| format!("{m}.weight"));
    weight.filter(|w| names.contains(&**w)).unwrap_or_else(|| name.to_owned())
}

/// The name with the numbers of layers and blocks replaced by `N`.
fn folded(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let of_layer = |i: usize| {
        let counted = ["layers", "blocks", "mtp", "deepstack_merger_list"];
        i > 0 && counted.contains(&parts[i - 1]) && parts[i].parse::<u64>().is_ok()
    };
    let fold = |i: usize| if of_layer(i) { "N" } else { parts[i] };
    (0..parts.len()).map(fold).collect::<Vec<_>>().join(".")
}

/// Parts of the names of tensors that a family may lack: its MTP layers may share the embedding and
/// the head of the model.
const MAY_LACK: &[(&str, &[&str])] = &[
    ("deepseek-v3", &["model.layers.N.embed_tokens.", "model.layers.N.shared_head.head."]),
    ("glm4-moe", &["model.layers.N.embed_tokens.", "model.layers.N.shared_head.head."]),
];

/// Regression: a checkpoint without a norm, an embedding, a head, a projection, a router, shared
/// experts or the MLP of a layer was mounted without a message.
#[test]
fn every_needed_tensor_is_required_in_the_published_layout() {
    assert_every_tensor_is_required(LayoutName::Hf, LayoutName::Native);
}

#[test]
fn every_needed_tensor_is_required_in_the_native_layout() {
    assert_every_tensor_is_required(LayoutName::Native, LayoutName::Hf);
}

#[test]
fn every_needed_tensor_is_required_in_the_transformers_layout() {
    assert_every_tensor_is_required(LayoutName::Transformers, LayoutName::Hf);
}

/// Omits each matrix in turn: in the first and the last layer that has it, and in one expert.
fn assert_every_tensor_is_required(layout: LayoutName, target: LayoutName) {
    let mut accepted = Vec::new();
    for family in FAMILIES {
        let toy = Toy::in_layout(family, layout);
        let allowed = MAY_LACK.iter().find(|(m, _)| *m == toy.model).map_or(&[][..], |r| r.1);
        let dir = tempfile::tempdir().unwrap();
        toy.write(dir.path());
        let names: BTreeSet<&str> = toy.tensors.keys().map(String::as_str).collect();
        let mut matrices: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
        for name in &names {
            matrices.entry(matrix_of(name, &names)).or_default().insert(name);
        }
        matrices.retain(|m, _| !m.contains(".experts.0.") && !m.contains(".experts.2."));
        let mut by_kind: BTreeMap<String, Vec<&String>> = BTreeMap::new();
        for matrix in matrices.keys() {
            by_kind.entry(folded(matrix)).or_default().push(matrix);
        }
        for (kind, of_layers) in &by_kind {
            let may_lack = allowed.iter().any(|a| kind.contains(a));
            let ends: BTreeSet<&&String> =
                of_layers.first().into_iter().chain(of_layers.last()).collect();
            for matrix in ends {
                list_without(&toy, dir.path(), &matrices[*matrix]);
                match plan(toy.model, dir.path(), &to(target)) {
                    Ok(_) if !may_lack => accepted.push(format!("{family} `{matrix}`")),
                    Err(e) if may_lack => panic!("{family} `{matrix}`: {e}"),
                    Err(e) => assert!(e.to_string().contains("missing"), "{matrix}: {e}"),
                    Ok(_) => {}
                }
            }
        }
    }
    assert_eq!(accepted, Vec::<String>::new());
}

/// Writes the index of a toy without some names. Tensors that the index does not list are not part
/// of the checkpoint.
fn list_without(toy: &Toy, dir: &Path, names: &BTreeSet<&str>) {
    let listed = toy.tensors.iter().filter(|(name, _)| !names.contains(&***name));
    let map: BTreeMap<&String, String> = listed.map(|(n, t)| (n, shard_name(t.shard))).collect();
    let index = json!({ "weight_map": map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// A family, and what is omitted from its checkpoint and config.json.
type Case = (&'static str, fn(&mut Toy) -> &mut Toy);

#[test]
fn tensors_that_releases_leave_out_are_not_required() {
    let cases: &[Case] = &[
        // MTP layers are missing, with and without a change of config.json.
        ("deepseek-v3", |t| t.drop_all("model.layers.2.")),
        ("deepseek-v3", |t| t.drop_all("model.layers.2.").set("num_nextn_predict_layers", 0)),
        ("glm4-moe", |t| t.drop_all("model.layers.2.").unset("num_nextn_predict_layers")),
        ("deepseek-v4-flash", |t| t.drop_all("mtp.")),
        ("mimo-v2-flash", |t| t.drop_all("model.mtp.")),
        // MTP layers without their copy of the embedding and the head.
        ("deepseek-v3", |t| t.drop_all("layers.2.embed").drop_all("layers.2.shared_head.head")),
        ("glm4-moe", |t| t.drop_all("layers.2.embed").drop_all("layers.2.shared_head.head")),
        // The head is tied to the embedding.
        ("qwen3-moe", |t| t.drop_all("lm_head").set("tie_word_embeddings", true)),
        ("gpt-oss", |t| t.drop_all("lm_head").set("tie_word_embeddings", true)),
        ("deepseek-v4-flash", |t| t.drop_all("head.w").set("tie_word_embeddings", true)),
        ("qwen3-vl-moe", |t| t.drop_all("lm_head").set("tie_word_embeddings", true)),
        ("kimi-k25-vl", |t| t.drop_all("lm_head").set("tie_word_embeddings", true)),
        // Fewer layers, as config.json states: only V3's dense layer, only V4's hash layers.
        ("deepseek-v3", |t| {
            first_layers(t, "model.layers.", 1, 3).set("num_nextn_predict_layers", 0)
        }),
        ("glm4-moe", |t| first_layers(t, "model.layers.", 1, 3).set("num_nextn_predict_layers", 0)),
        ("qwen3-moe", |t| first_layers(t, "model.layers.", 1, 2)),
        ("mimo-v2-flash", |t| first_layers(t, "model.layers.", 1, 3)),
        ("mimo-v2-flash", |t| first_layers(t, "model.layers.", 2, 3)),
        ("deepseek-v4-flash", |t| first_layers(t, "layers.", 1, 4)),
        ("deepseek-v4-flash", |t| first_layers(t, "layers.", 2, 4)),
        ("deepseek-v4-base", |t| first_layers(t, "layers.", 3, 4)),
        // No shared experts.
        ("deepseek-v3", |t| t.drop_all("shared_experts").set("n_shared_experts", 0)),
        ("deepseek-v3", |t| t.drop_all("shared_experts").unset("n_shared_experts")),
        ("glm4-moe", |t| t.drop_all("shared_experts").set("n_shared_experts", 0)),
        ("deepseek-v4-flash", |t| t.drop_all("shared_experts").unset("n_shared_experts")),
        // A router without a bias, attention without biases or norms.
        ("deepseek-v3", |t| t.drop_all("e_score").set("topk_method", "greedy")),
        ("mimo-v2-flash", |t| t.drop_all("e_score").set("topk_method", "greedy")),
        ("minimax-m2", |t| t.drop_all("e_score").set("use_routing_bias", false)),
        ("minimax-m2", |t| t.drop_all("k_norm").drop_all("q_norm").set("use_qk_norm", false)),
        ("glm4-moe", |t| t.drop_all("k_norm").drop_all("q_norm").unset("use_qk_norm")),
        ("glm4-moe", |t| t.drop_all("proj.bias").set("attention_bias", false)),
        ("gpt-oss", |t| t.drop_all("_proj.bias").set("attention_bias", false)),
        // Attention without low-rank projections.
        ("deepseek-v3", |t| {
            t.drop_all("q_b_proj").drop_all("q_a_layernorm").rename_all("q_a_proj", "q_proj")
        }),
        // V4 without hash layers.
        ("deepseek-v4-flash", |t| {
            t.drop_all("tid2eid").set("num_hash_layers", 0);
            t.copy("layers.2.ffn.gate.bias", "layers.0.ffn.gate.bias")
                .copy("layers.2.ffn.gate.bias", "layers.1.ffn.gate.bias")
        }),
        // Hash layers with a router bias.
        ("deepseek-v4-flash", |t| {
            t.copy("layers.2.ffn.gate.bias", "layers.0.ffn.gate.bias")
                .copy("layers.2.ffn.gate.bias", "layers.1.ffn.gate.bias")
        }),
        // No attention sinks.
        ("mimo-v2-flash", |t| t.drop_all("sink_bias").set("add_swa_attention_sink_bias", false)),
        // Only the language model.
        ("kimi-k25-vl", |t| t.drop_all("vision_tower").drop_all("mm_projector")),
        ("kimi-k25-vl", |t| {
            t.drop_all("vision_tower").drop_all("mm_projector").unset("vision_config")
        }),
        ("qwen3-vl-moe", |t| t.drop_all("visual")),
        ("qwen3-vl-moe", |t| t.drop_all("visual").unset("vision_config")),
        // A buffer that only some layers have.
        ("deepseek-v3", |t| {
            t.add("model.layers.1.self_attn.rotary_emb.inv_freq", Dtype::F32, &[8])
        }),
    ];
    for (i, (family, change)) in cases.iter().enumerate() {
        let mut toy = Toy::golden(family);
        change(&mut toy);
        for layout in LAYOUTS {
            if let Err(e) = toy.mount(&to(layout), |_| {}) {
                panic!("row {i}, {family} {layout}: {e}");
            }
        }
    }
}

/// Keeps the first `keep` layers, and states that in config.json.
fn first_layers<'t>(toy: &'t mut Toy, layers: &str, keep: usize, all: usize) -> &'t mut Toy {
    for layer in keep..all {
        let start = format!("{layers}{layer}.");
        toy.tensors.retain(|name, _| !name.starts_with(&start));
    }
    toy.set("num_hidden_layers", keep)
}

/// Regression: a tensor without a rule in one layer became required in every layer, whatever
/// `--unmapped` said.
#[test]
fn an_unmapped_tensor_in_one_layer_is_not_required_in_another() {
    for family in FAMILIES {
        let mut toy = Toy::golden(family);
        let experts = toy.full_name("~");
        let layer = experts.split_once(".1.").unwrap().0.to_owned() + ".1";
        toy.add(&format!("{layer}.stranger.weight"), Dtype::BF16, &[4]);
        for layout in LAYOUTS {
            for unmapped in [Unmapped::Keep, Unmapped::Drop] {
                let options = PlanOptions { unmapped, ..to(layout) };
                if let Err(e) = toy.mount(&options, |_| {}) {
                    panic!("{family} {layout} {unmapped:?}: {e}");
                }
            }
        }
    }
}

/// Regression: with the `--unmapped` that the message advised, such a checkpoint was mounted
/// without any layer.
#[test]
fn names_with_the_prefix_of_another_model_are_missing_layers() {
    let cases = [
        ("qwen3-vl-moe", "model.language_model.", "model.", "model.language_model.layers.0"),
        ("kimi-k25-vl", "language_model.model.", "model.", "language_model.model.layers.0"),
        ("qwen3-moe", "model.layers.", "transformer.h.", "model.layers.0"),
        ("deepseek-v4-flash", "layers.", "blocks.", "layers.0"),
    ];
    for (family, from, prefix, layer) in cases {
        let mut toy = Toy::golden(family);
        toy.rename_all(from, prefix);
        let n = toy.config.pointer("/text_config/num_hidden_layers");
        let n = n.or_else(|| toy.config.get("num_hidden_layers")).and_then(Value::as_u64).unwrap();
        let expected = format!(
            "{n} missing layers: `{layer}` (none is there, by config.json there are {n}), "
        );
        for unmapped in [Unmapped::Keep, Unmapped::Drop] {
            let options = PlanOptions { unmapped, ..to(LayoutName::Native) };
            let message = toy.mount(&options, |_| {}).err().unwrap();
            assert!(message.starts_with(&expected), "{family} {message}");
        }
    }
}

/// The summary names tensors that may be missing; other missing tensors are still errors.
#[test]
fn allow_missing_reports_its_tensors_and_keeps_other_checks() {
    let dir = tempfile::tempdir().unwrap();
    let mut toy = Toy::golden("qwen3-moe");
    toy.drop("model.norm.weight").drop("model.layers.1.self_attn.q_proj.weight");
    toy.write(dir.path());
    let allow = |text: &str| PlanOptions {
        allow_missing: vec![regex::Regex::new(text).unwrap()],
        ..PlanOptions::default()
    };
    let both = r"model\.norm\.weight|.*q_proj.*";
    let summary = plan("qwen3-moe", dir.path(), &allow(both)).unwrap().summary.to_string();
    let named = "WARNING: missing and allowed to be: `model.norm.weight` and 1 more";
    assert!(summary.contains(named), "{summary}");
    let message = plan("qwen3-moe", dir.path(), &allow(r"model\.norm\.weight")).unwrap_err();
    let message = message.to_string();
    assert!(message.contains("q_proj") && !message.contains("model.norm"), "{message}");
}
