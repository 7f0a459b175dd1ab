//! Compares the small checkpoints ("toys") with the tables of their releases: same names, dtypes
//! and ranks, same kinds of layer, and same config.json except for sizes.
//!
//! A test with a toy is valid for a release only if the two have the same tensors. One toy had
//! `post_attention_layernorm` where its release has `pre_mlp_layernorm`: every test passed, and the
//! release was refused.

#[allow(dead_code)]
#[path = "../examples/quickstart/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/table.rs"]
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use common::{golden, tensors_of_dir};
use serde_json::Value;
use table::table;

/// Folder of `tests/golden`, folder of `tests/releases`.
const TOYS: [(&str, &str); 10] = [
    ("deepseek-v3", "deepseek-v3"),
    ("deepseek-v4-base", "deepseek-v4-flash-base"),
    ("deepseek-v4-flash", "deepseek-v4-flash"),
    ("glm4-moe", "glm-4.5"),
    ("gpt-oss", "gpt-oss-20b"),
    ("kimi-k25-vl", "kimi-k2.5"),
    ("mimo-v2-flash", "mimo-v2-flash"),
    ("minimax-m2", "minimax-m2.7"),
    ("qwen3-moe", "qwen3-30b-a3b"),
    ("qwen3-vl-moe", "qwen3-vl-30b-a3b"),
];

/// Keys of config.json that a toy has in addition to its release's, for transformers.
const EXTRA_KEYS: [(&str, &str); 4] = [
    ("kimi-k25-vl", "projection_hidden_size"),
    ("kimi-k25-vl", "vision_config"),
    ("mimo-v2-flash", "layer_types"),
    ("qwen3-vl-moe", "text_config.rope_scaling"),
];

type Tensors = BTreeMap<String, (String, Vec<u64>)>;

/// Properties of a tensor that are compared: name without indices, dtype, rank.
type Line = (String, String, usize);

fn release(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/releases").join(name)
}

fn published(name: &str) -> Tensors {
    let tensors = table(&release(name));
    let count = tensors.len();
    let map: Tensors = tensors.into_iter().map(|(n, dtype, shape)| (n, (dtype, shape))).collect();
    assert_eq!(map.len(), count, "{name}: a tensor is there twice");
    map
}

fn toy(folder: &str) -> Tensors {
    let wide = |shape: Vec<usize>| shape.into_iter().map(|n| u64::try_from(n).unwrap()).collect();
    let tensors = tensors_of_dir(&golden(folder).join("checkpoint")).into_iter();
    tensors.map(|(name, (dtype, shape, _))| (name, (dtype, wide(shape)))).collect()
}

fn quickstart() -> Tensors {
    let tensors = checkpoint::Written::model().tensors.into_iter();
    let wide = |n: usize| u64::try_from(n).unwrap();
    tensors
        .map(|(name, t)| {
            (name, (format!("{:?}", t.dtype), t.shape.into_iter().map(wide).collect()))
        })
        .collect()
}

fn is_index(part: &str) -> bool {
    part.bytes().all(|b| b.is_ascii_digit())
}

/// Replaces indices between dots with `{}`.
fn fold(name: &str) -> String {
    let mut folded = String::with_capacity(name.len());
    for part in name.split('.') {
        folded.push_str(if is_index(part) { "{}" } else { part });
        folded.push('.');
    }
    folded.pop();
    folded
}

fn lines(tensors: &Tensors) -> BTreeSet<Line> {
    tensors.iter().map(|(name, (dtype, shape))| (fold(name), dtype.clone(), shape.len())).collect()
}

/// The kinds of layer in each list of layers: the distinct sets of tensors in a layer. The first
/// index in a name is that of its layer.
fn kinds(tensors: &Tensors) -> BTreeMap<String, BTreeSet<BTreeSet<Line>>> {
    let mut layers: BTreeMap<(String, &str), BTreeSet<Line>> = BTreeMap::new();
    for (name, (dtype, shape)) in tensors {
        let parts: Vec<&str> = name.split('.').collect();
        let Some(at) = parts.iter().position(|part| is_index(part)) else { continue };
        let line = (fold(&parts[at + 1..].join(".")), dtype.clone(), shape.len());
        layers.entry((parts[..at].join("."), parts[at])).or_default().insert(line);
    }
    let mut kinds: BTreeMap<String, BTreeSet<BTreeSet<Line>>> = BTreeMap::new();
    for ((list, _), layer) in layers {
        kinds.entry(list).or_default().insert(layer);
    }
    kinds
}

fn assert_same_structure(name: &str, toy: &Tensors, release: &Tensors) {
    let (ours, theirs) = (lines(toy), lines(release));
    let missing: Vec<_> = theirs.difference(&ours).collect();
    let invented: Vec<_> = ours.difference(&theirs).collect();
    assert!(
        missing.is_empty() && invented.is_empty(),
        "{name}: missing {missing:?}, not in the release {invented:?}"
    );
    let (ours, theirs) = (kinds(toy), kinds(release));
    for (list, theirs) in &theirs {
        let ours = &ours[list];
        if let Some(layer) = theirs.symmetric_difference(ours).next() {
            let (here, there) = match theirs.contains(layer) {
                true => ("the release", ours),
                false => ("the toy", theirs),
            };
            let nearest = there.iter().min_by_key(|l| l.symmetric_difference(layer).count());
            let differ = nearest.map(|l| l.symmetric_difference(layer).collect::<Vec<_>>());
            panic!(
                "{name}: only {here} has this kind of `{list}`; the nearest differs in {differ:?}"
            );
        }
    }
}

#[test]
fn toys_have_the_tensors_and_layer_kinds_of_their_releases() {
    for (folder, name) in TOYS {
        assert_same_structure(folder, &toy(folder), &published(name));
    }
}

/// The toy that did not match its release, see above.
#[test]
#[should_panic(expected = "model.mtp.layers.{}.pre_mlp_layernorm.weight")]
fn a_toy_with_a_wrong_name_is_detected() {
    let other = |name: &str| name.replace("pre_mlp_layernorm", "post_attention_layernorm");
    let toy = toy("mimo-v2-flash").into_iter().map(|(name, tensor)| (other(&name), tensor));
    assert_same_structure("toy", &toy.collect(), &published("mimo-v2-flash"));
}

#[test]
#[should_panic(expected = "only the toy has this kind of `model.layers`")]
fn a_toy_with_an_extra_kind_of_layer_is_detected() {
    let mut toy = toy("mimo-v2-flash");
    toy.remove("model.layers.1.self_attn.attention_sink_bias");
    toy.remove("model.layers.1.mlp.gate.e_score_correction_bias");
    toy.insert("model.layers.0.self_attn.attention_sink_bias".into(), ("BF16".into(), vec![4]));
    assert_same_structure("toy", &toy, &published("mimo-v2-flash"));
}

#[test]
fn the_quickstart_checkpoint_has_the_tensors_of_its_release() {
    assert_same_structure("quickstart", &quickstart(), &published("mimo-v2-flash"));
}

/// For every layer with separate K and V: whether it has sinks, and whether its K scales have more
/// rows than a plain grid of blocks.
fn fused_and_sinks(tensors: &Tensors) -> BTreeSet<(bool, bool)> {
    let rows = |name: &str| tensors[name].1[0];
    let keys = tensors.keys().filter(|name| name.ends_with(".k_proj.weight"));
    keys.map(|name| {
        let sinks = name.replace("k_proj.weight", "attention_sink_bias");
        let fused = rows(&format!("{name}_scale_inv")) > rows(name).div_ceil(128);
        (tensors.contains_key(&sinks), fused)
    })
    .collect()
}

#[test]
fn scales_are_fused_where_the_release_has_no_sinks() {
    let expected = [(false, true), (true, false)].into();
    let table = published("mimo-v2-flash");
    for tensors in [&table, &toy("mimo-v2-flash"), &quickstart()] {
        assert_eq!(fused_and_sinks(tensors), expected);
    }
}

/// Collects every value of a config by dotted key. Lists are values.
fn values(value: &Value, key: &str, out: &mut BTreeMap<String, Value>) {
    match value.as_object() {
        Some(object) if !object.is_empty() => {
            for (name, value) in object {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                values(value, &key, out);
            }
        }
        _ => {
            out.insert(key.to_owned(), value.clone());
        }
    }
}

fn config(dir: &Path) -> BTreeMap<String, Value> {
    let text = std::fs::read(dir.join("config.json")).unwrap();
    let mut out = BTreeMap::new();
    values(&serde_json::from_slice(&text).unwrap(), "", &mut out);
    out
}

/// Whether two values differ, except for numbers and lists, which may have any size.
fn contradicts(ours: &Value, theirs: &Value) -> bool {
    let sizes = (ours.is_number() && theirs.is_number()) || (ours.is_array() && theirs.is_array());
    !sizes && ours != theirs
}

#[test]
fn configs_equal_those_of_the_releases_except_for_sizes() {
    for (folder, name) in TOYS {
        let (ours, theirs) = (config(&golden(folder).join("checkpoint")), config(&release(name)));
        for (key, value) in &theirs {
            let got = ours.get(key).unwrap_or_else(|| panic!("{folder}: no `{key}`"));
            assert!(!contradicts(got, value), "{folder}: `{key}`: expected {value}, got {got}");
        }
        for key in ours.keys().filter(|key| !theirs.contains_key(*key)) {
            let known =
                EXTRA_KEYS.iter().any(|(toy, part)| *toy == folder && key.starts_with(part));
            assert!(known, "{folder}: the release has no `{key}`");
        }
    }
}

#[test]
fn the_quickstart_config_has_no_key_that_its_release_lacks() {
    let dir = tempfile::tempdir().unwrap();
    checkpoint::Written::model().save(dir.path()).unwrap();
    let theirs = config(&release("mimo-v2-flash"));
    for (key, value) in config(dir.path()) {
        let known = theirs.get(&key).is_some_and(|theirs| !contradicts(&value, theirs));
        assert!(known, "the release has no `{key}`: {value}");
    }
}
