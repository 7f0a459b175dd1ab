//! What a checkpoint lacks is said, and what releases and their copies leave out is not missed.

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

/// A tensor's name without the end that payloads, scales and shapes have.
fn matrix_of(name: &str, names: &BTreeSet<&str>) -> String {
    let ends = ["_scale_inv", "_packed", "_scale", "_shape", "_blocks", "_scales"];
    let of_weight = |m: &&str| m.ends_with(".weight") || m.ends_with("_proj");
    if let Some(matrix) = ends.iter().find_map(|e| name.strip_suffix(e)).filter(of_weight) {
        return matrix.to_owned();
    }
    let weight = name.strip_suffix(".scale").map(|m| format!("{m}.weight"));
    weight.filter(|w| names.contains(&**w)).unwrap_or_else(|| name.to_owned())
}

/// Numbers of layers and blocks as `N`.
fn folded(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let of_layer = |i: usize| {
        let counted = ["layers", "blocks", "mtp", "deepstack_merger_list"];
        i > 0 && counted.contains(&parts[i - 1]) && parts[i].parse::<u64>().is_ok()
    };
    let fold = |i: usize| if of_layer(i) { "N" } else { parts[i] };
    (0..parts.len()).map(fold).collect::<Vec<_>>().join(".")
}

/// What each family may lack: its MTP layers share the model's embedding and head or have no sinks,
/// and biases that stand once in a vision tower are not known.
const MAY_LACK: &[(&str, &[&str])] = &[
    ("deepseek-v3", &["model.layers.N.embed_tokens.", "model.layers.N.shared_head.head."]),
    ("glm4-moe", &["model.layers.N.embed_tokens.", "model.layers.N.shared_head.head."]),
];

/// A norm, an embedding, a head, a projection, a router, shared experts or a layer's whole MLP were
/// missing, and the mount came up without a word.
#[test]
fn whatever_a_model_needs_is_missed_in_its_published_layout() {
    assert_needed(LayoutName::Hf, LayoutName::Native);
}

#[test]
fn whatever_a_model_needs_is_missed_in_the_native_layout() {
    assert_needed(LayoutName::Native, LayoutName::Hf);
}

#[test]
fn whatever_a_model_needs_is_missed_in_the_layout_of_transformers() {
    assert_needed(LayoutName::Transformers, LayoutName::Hf);
}

/// Leaves out every matrix in turn: in the first and the last layer that has it, and of one expert.
fn assert_needed(layout: LayoutName, target: LayoutName) {
    let mut silent = Vec::new();
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
        let mut alike: BTreeMap<String, Vec<&String>> = BTreeMap::new();
        for matrix in matrices.keys() {
            alike.entry(folded(matrix)).or_default().push(matrix);
        }
        for (kind, of_layers) in &alike {
            let may_lack = allowed.iter().any(|a| kind.contains(a));
            let ends: BTreeSet<&&String> =
                of_layers.first().into_iter().chain(of_layers.last()).collect();
            for matrix in ends {
                list_without(&toy, dir.path(), &matrices[*matrix]);
                match plan(toy.model, dir.path(), &to(target)) {
                    Ok(_) if !may_lack => silent.push(format!("{family} `{matrix}`")),
                    Err(e) if may_lack => panic!("{family} `{matrix}`: {e}"),
                    Err(e) => assert!(e.to_string().contains("missing"), "{matrix}: {e}"),
                    Ok(_) => {}
                }
            }
        }
    }
    assert_eq!(silent, Vec::<String>::new());
}

/// Writes the index of a toy without some names: what an index does not list is not there.
fn list_without(toy: &Toy, dir: &Path, names: &BTreeSet<&str>) {
    let listed = toy.tensors.iter().filter(|(name, _)| !names.contains(&***name));
    let map: BTreeMap<&String, String> = listed.map(|(n, t)| (n, shard_name(t.shard))).collect();
    let index = json!({ "weight_map": map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Rows of a table: a family, what was left out of its checkpoint and config.json, and why.
type Case = (&'static str, fn(&mut Toy) -> &mut Toy);

#[test]
fn what_releases_and_their_copies_leave_out_is_not_missed() {
    let cases: &[Case] = &[
        // MTP layers are removed, with and without config.json saying so.
        ("deepseek-v3", |t| t.drop_all("model.layers.2.")),
        ("deepseek-v3", |t| t.drop_all("model.layers.2.").set("num_nextn_predict_layers", 0)),
        ("glm4-moe", |t| t.drop_all("model.layers.2.").unset("num_nextn_predict_layers")),
        ("deepseek-v4-flash", |t| t.drop_all("mtp.")),
        ("mimo-v2-flash", |t| t.drop_all("model.mtp.")),
        // Or only what they have of the model's own.
        ("deepseek-v3", |t| t.drop_all("layers.2.embed").drop_all("layers.2.shared_head.head")),
        ("glm4-moe", |t| t.drop_all("layers.2.embed").drop_all("layers.2.shared_head.head")),
        // The embedding is the head.
        ("qwen3-moe", |t| t.drop_all("lm_head").set("tie_word_embeddings", true)),
        ("gpt-oss", |t| t.drop_all("lm_head").set("tie_word_embeddings", true)),
        ("deepseek-v4-flash", |t| t.drop_all("head.w").set("tie_word_embeddings", true)),
        ("qwen3-vl-moe", |t| t.drop_all("lm_head").set("tie_word_embeddings", true)),
        ("kimi-k25-vl", |t| t.drop_all("lm_head").set("tie_word_embeddings", true)),
        // Fewer layers, and a config.json that says so: V3's dense one, V4's hash layers.
        ("deepseek-v3", |t| cut(t, "model.layers.", 1, 3).set("num_nextn_predict_layers", 0)),
        ("glm4-moe", |t| cut(t, "model.layers.", 1, 3).set("num_nextn_predict_layers", 0)),
        ("qwen3-moe", |t| cut(t, "model.layers.", 1, 2)),
        ("mimo-v2-flash", |t| cut(t, "model.layers.", 1, 3)),
        ("mimo-v2-flash", |t| cut(t, "model.layers.", 2, 3)),
        ("deepseek-v4-flash", |t| cut(t, "layers.", 1, 4)),
        ("deepseek-v4-flash", |t| cut(t, "layers.", 2, 4)),
        ("deepseek-v4-base", |t| cut(t, "layers.", 3, 4)),
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
        // Attention without a low rank.
        ("deepseek-v3", |t| {
            t.drop_all("q_b_proj").drop_all("q_a_layernorm").rename_all("q_a_proj", "q_proj")
        }),
        // V4 without hash layers.
        ("deepseek-v4-flash", |t| {
            t.drop_all("tid2eid").set("num_hash_layers", 0);
            t.copy("layers.2.ffn.gate.bias", "layers.0.ffn.gate.bias")
                .copy("layers.2.ffn.gate.bias", "layers.1.ffn.gate.bias")
        }),
        // Hash layers that were trained with a router's bias.
        ("deepseek-v4-flash", |t| {
            t.copy("layers.2.ffn.gate.bias", "layers.0.ffn.gate.bias")
                .copy("layers.2.ffn.gate.bias", "layers.1.ffn.gate.bias")
        }),
        // Sinks nowhere.
        ("mimo-v2-flash", |t| t.drop_all("sink_bias").set("add_swa_attention_sink_bias", false)),
        // The text model alone.
        ("kimi-k25-vl", |t| t.drop_all("vision_tower").drop_all("mm_projector")),
        ("kimi-k25-vl", |t| {
            t.drop_all("vision_tower").drop_all("mm_projector").unset("vision_config")
        }),
        ("qwen3-vl-moe", |t| t.drop_all("visual")),
        ("qwen3-vl-moe", |t| t.drop_all("visual").unset("vision_config")),
        // A buffer that some layers have.
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

/// Keeps the first layers and says so.
fn cut<'t>(toy: &'t mut Toy, layers: &str, keep: usize, all: usize) -> &'t mut Toy {
    for layer in keep..all {
        let start = format!("{layers}{layer}.");
        toy.tensors.retain(|name, _| !name.starts_with(&start));
    }
    toy.set("num_hidden_layers", keep)
}

/// A tensor that no rule takes became one that every layer needs, whatever `--unmapped` said.
#[test]
fn a_stranger_in_one_layer_is_not_missed_in_another() {
    for family in FAMILIES {
        let mut toy = Toy::golden(family);
        let experts = toy.whole("~");
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

/// With the `--unmapped` that the refusal advised, such a checkpoint mounted without a layer.
#[test]
fn a_prefix_of_another_model_leaves_no_layer() {
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

/// What may be missing is named, and the rest is still missed.
#[test]
fn what_is_allowed_to_be_missing_is_named() {
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
