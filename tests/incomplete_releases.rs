//! Releases at full size with missing tensors, in the published and in the native layout: they are
//! refused, and the message names what is missing.
//!
//! Opening a release takes longer than the search for missing tensors, so one checkpoint lacks many
//! tensors, a few per layer. The message names five and counts all. If the count is wrong, the test
//! omits five tensors at a time, and the message must name each of them. Experts, and whole
//! sections of a layer, are omitted one at a time.

#[path = "common/release.rs"]
mod release;
#[path = "common/sparse.rs"]
mod sparse;
#[path = "common/table.rs"]
mod table;

use std::collections::{BTreeMap, BTreeSet};

use mount_ckpt::{LayoutName, PlanOptions};
use release::{Entry, Release, logical_tensors, plan};
use sparse::Sparse;

/// How many names a message lists for one kind of problem.
const LISTED: usize = 5;

/// Over how many checkpoints the omitted tensors of a release are distributed.
const CHECKPOINTS: usize = 3;

/// Numbers of layers that have the same tensors.
type Kind = &'static [u64];

/// A release, and the layers from which tensors are omitted.
struct Case {
    name: &'static str,
    /// Prefix of the layers in published names, and the kinds of layer.
    lists: &'static [(&'static str, &'static [Kind])],
    /// Prefixes of the experts and of the MLP within a layer.
    experts: &'static str,
    mlp: &'static str,
    /// The same for the native layout.
    native_lists: &'static [(&'static str, &'static [Kind])],
    native_experts: &'static str,
    native_mlp: &'static str,
    /// Tensors that a layer may lack: an MTP layer may share the embedding and the head of the
    /// model.
    may_lack: &'static [&'static str],
}

/// A release whose layers have the same prefixes in both layouts, and may not lack anything.
const fn same_in_both_layouts(lists: &'static [(&'static str, &'static [Kind])]) -> Case {
    Case {
        name: "",
        lists,
        experts: EXPERTS,
        mlp: "mlp.",
        native_lists: lists,
        native_experts: EXPERTS,
        native_mlp: "mlp.",
        may_lack: &[],
    }
}

/// A sparse checkpoint, and the stored tensors of each of its matrices.
struct StoredCheckpoint {
    sparse: Sparse,
    /// Matrix -> names of its stored tensors.
    matrices: BTreeMap<String, Vec<String>>,
}

impl StoredCheckpoint {
    fn published(release: &Release) -> StoredCheckpoint {
        let stored = release.tensors();
        let logical_tensors = logical_tensors(&stored);
        let mut matrices: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (matrix, payload) in &logical_tensors.payloads {
            matrices.entry(matrix.clone()).or_default().push(payload.clone());
        }
        for (part, matrix) in &logical_tensors.parts {
            matrices.get_mut(matrix).unwrap().push(part.clone());
        }
        StoredCheckpoint { sparse: release.write(), matrices }
    }

    /// The same checkpoint in the native layout.
    fn native(published: &StoredCheckpoint, release: &Release) -> StoredCheckpoint {
        let (_, plan) = plan(published.sparse.path(), &to(LayoutName::Native)).unwrap();
        let ids = plan.directories[0].tensors.iter();
        let tensors = ids.map(|id| plan.tensor(*id));
        let entry = |t: &mount_ckpt::TensorPlan| {
            (t.name.to_string(), t.dtype.name().to_owned(), t.shape.dims().to_vec())
        };
        let entries: Vec<Entry> = tensors.map(entry).collect();
        let mut config = release.config();
        config.as_object_mut().unwrap().shift_remove("quantization_config");
        let files = [("config.json".to_owned(), serde_json::to_vec(&config).unwrap())];
        let matrices = entries.iter().map(|(name, ..)| (name.clone(), vec![name.clone()]));
        StoredCheckpoint { sparse: Sparse::write(&entries, &files), matrices: matrices.collect() }
    }

    /// Plans a view of the checkpoint without some matrices. Returns the message if it is refused.
    fn without(&self, lacks: &BTreeSet<&str>, layout: LayoutName) -> Result<(), String> {
        let stored = lacks.iter().flat_map(|matrix| &self.matrices[*matrix]);
        let stored: BTreeSet<&str> = stored.map(String::as_str).collect();
        self.sparse.index_without(|name| stored.contains(name));
        let planned = plan(self.sparse.path(), &to(layout));
        planned.map(|_| ())
    }

    fn within<'a>(&'a self, start: &str) -> BTreeSet<&'a str> {
        let names = self.matrices.keys().map(String::as_str);
        names.filter(|name| name.starts_with(start)).collect()
    }
}

fn to(layout: LayoutName) -> PlanOptions {
    PlanOptions { to: Some(layout), ..PlanOptions::default() }
}

/// An omitted matrix, and texts of which the message must contain one.
type Single<'a> = (&'a str, Vec<String>);

/// What is omitted from a checkpoint.
enum Omission<'a> {
    /// Single matrices. The message must report each.
    Tensors(Vec<Single<'a>>),
    /// A section of one or all layers. The message must contain one of the texts.
    Section(BTreeSet<&'a str>, Vec<String>),
}

/// Whether a component of a name is a number.
fn is_index(part: &str) -> bool {
    part.bytes().all(|b| b.is_ascii_digit())
}

/// Matrices without a number in their names: those outside of layers.
fn of_the_model(whole: &StoredCheckpoint) -> Vec<&str> {
    let names = whole.matrices.keys().map(String::as_str);
    names.filter(|name| !name.split('.').any(is_index)).collect()
}

/// Names of a layer's matrices, without the prefix of the layer. Of the experts, only number 7.
fn of_a_layer<'a>(whole: &'a StoredCheckpoint, start: &str) -> Vec<&'a str> {
    let names = whole.within(start).into_iter().map(|name| &name[start.len()..]);
    names.filter(|name| name.split('.').filter(|p| is_index(p)).all(|part| part == "7")).collect()
}

/// A missing matrix with its name. If one of two tensors is required, the message may name the
/// other one.
fn single(name: &str) -> Single<'_> {
    let other = name.strip_suffix("gate.tid2eid").map(|start| match start.ends_with("ffn.") {
        true => format!("`{start}gate.bias`"),
        false => format!("`{start}gate.e_score_correction_bias`"),
    });
    (name, [format!("`{name}`")].into_iter().chain(other).collect())
}

/// Omits each matrix outside of layers and each matrix of every kind of layer.
fn singles<'a>(
    whole: &'a StoredCheckpoint,
    lists: &[(&str, &'static [Kind])],
    may_lack: &[&str],
) -> Vec<Omission<'a>> {
    let mut rounds: Vec<Vec<Single<'a>>> = vec![Vec::new(); CHECKPOINTS];
    let mut alone = Vec::new();
    for (i, name) in of_the_model(whole).into_iter().enumerate() {
        rounds[i % CHECKPOINTS].push(single(name));
    }
    for (start, kinds) in lists {
        for kind in *kinds {
            let first = of_a_layer(whole, &format!("{start}{}.", kind[0]));
            let first = first.into_iter().filter(|name| !may_lack.contains(name));
            for (i, name) in first.enumerate() {
                let layer = kind[(i / CHECKPOINTS) % kind.len()];
                let full = format!("{start}{layer}.{name}");
                let found = whole.matrices.get_key_value(&full);
                let (full, _) = found.unwrap_or_else(|| panic!("no `{full}`"));
                // Other tensors of the MLP are not required in a layer without experts, so experts
                // are omitted separately.
                match name.contains(".experts.") {
                    true => alone.push(vec![single(full)]),
                    false => rounds[i % CHECKPOINTS].push(single(full)),
                }
            }
        }
    }
    rounds.extend(alone);
    rounds.into_iter().filter(|round| !round.is_empty()).map(Omission::Tensors).collect()
}

/// Omits whole sections of layers. The message must name the layer or one of its tensors.
fn parts<'a>(
    whole: &'a StoredCheckpoint,
    lists: &[(&str, &'static [Kind])],
    experts: &str,
    mlp: &str,
) -> Vec<Omission<'a>> {
    let (start, kinds) = lists[0];
    let layer = kinds[0][0];
    let one = |part: &str| whole.within(&format!("{start}{layer}.{part}"));
    // Messages show a missing layer under its published name.
    let itself = || format!("layers.{layer}`");
    let of_it = |part: &str| vec![format!("`{start}{layer}.{part}"), itself()];
    let of_any = |name: &&str| {
        let within = name.strip_prefix(start).and_then(|rest| rest.split_once('.'));
        within.is_some_and(|(_, rest)| rest.starts_with(experts))
    };
    let every = whole.matrices.keys().map(String::as_str).filter(of_any).collect();
    let parts = [
        (one(experts), of_it(experts)),
        (one(mlp), of_it(mlp)),
        (one(""), vec![itself()]),
        (every, vec![experts.to_owned()]),
    ];
    parts.into_iter().map(|(lacks, named)| Omission::Section(lacks, named)).collect()
}

/// The number of missing tensors in a message.
fn counted(message: &str) -> usize {
    let missing = message.split("; ").filter(|kind| kind.contains(" missing tensor"));
    missing.filter_map(|kind| kind.split(' ').next()?.parse::<usize>().ok()).sum()
}

/// Lists checkpoints that were accepted, or whose message does not name what is missing.
fn unexpected_results(
    what: &str,
    whole: &StoredCheckpoint,
    omissions: &[Omission<'_>],
    layout: LayoutName,
) -> Vec<String> {
    let mut faults = Vec::new();
    let mut fault = |fault: String| {
        println!("  FAILS {what}: {fault}");
        faults.push(format!("{what}: {fault}"));
    };
    for omission in omissions {
        match omission {
            Omission::Section(lacks, named) => {
                assert!(!lacks.is_empty(), "{what}: nothing to leave out for {named:?}");
                let first = lacks.first().unwrap();
                match whole.without(lacks, layout) {
                    Ok(()) => fault(format!("accepted without {} from `{first}` on", lacks.len())),
                    Err(message) if named.iter().any(|part| message.contains(part)) => {}
                    Err(message) => fault(format!("none of {named:?} is named: {message}")),
                }
            }
            Omission::Tensors(singles) => {
                let lacks = |part: &[Single<'_>]| -> Result<(), String> {
                    whole.without(&part.iter().map(|(name, _)| *name).collect(), layout)
                };
                let all = lacks(singles).err().unwrap_or_default();
                if singles.len() > LISTED && counted(&all) == singles.len() {
                    continue;
                }
                for group in singles.chunks(LISTED) {
                    let message = match group.len() == singles.len() {
                        true => all.clone(),
                        false => lacks(group).err().unwrap_or_default(),
                    };
                    let named = |single: &&Single<'_>| single.1.iter().any(|n| message.contains(n));
                    for (name, _) in group.iter().filter(|single| !named(single)) {
                        fault(format!("missing `{name}` is not named: {message}"));
                    }
                }
            }
        }
    }
    faults
}

impl Case {
    fn check(&self) {
        let release = Release::read(self.name);
        let published = StoredCheckpoint::published(&release);
        let native = StoredCheckpoint::native(&published, &release);
        let mut omissions = singles(&published, self.lists, self.may_lack);
        omissions.extend(parts(&published, self.lists, self.experts, self.mlp));
        let what = format!("{}, published", self.name);
        let mut failures = unexpected_results(&what, &published, &omissions, LayoutName::Native);
        let mut omissions = singles(&native, self.native_lists, self.may_lack);
        omissions.extend(parts(&native, self.native_lists, self.native_experts, self.native_mlp));
        let what = format!("{}, native", self.name);
        failures.extend(unexpected_results(&what, &native, &omissions, LayoutName::Hf));
        assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    }
}

const EXPERTS: &str = "mlp.experts.";

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "true sizes: cargo test --release --test incomplete_releases"
)]
fn deepseek_v3_without_a_tensor_is_refused() {
    let lists: &'static [(&str, &[Kind])] =
        &[("model.layers.", &[&[30, 31, 32, 33, 34], &[0, 1, 2], &[61]])];
    Case {
        name: "deepseek-v3",
        may_lack: &["embed_tokens.weight", "shared_head.head.weight"],
        ..same_in_both_layouts(lists)
    }
    .check();
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "true sizes: cargo test --release --test incomplete_releases"
)]
fn deepseek_v4_flash_without_a_tensor_is_refused() {
    // With an indexer; with only a compressor; with neither; with an indexer and hash routing.
    const KINDS: &[Kind] = &[&[20, 22, 24, 26, 28], &[21, 23, 25, 27, 29], &[0, 1], &[2]];
    Case {
        name: "deepseek-v4-flash",
        lists: &[("layers.", KINDS), ("mtp.", &[&[0]])],
        experts: "ffn.experts.",
        mlp: "ffn.",
        native_lists: &[("model.layers.", KINDS), ("mtp.layers.", &[&[0]])],
        native_experts: EXPERTS,
        native_mlp: "mlp.",
        may_lack: &[],
    }
    .check();
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "true sizes: cargo test --release --test incomplete_releases"
)]
fn glm_4_5_without_a_tensor_is_refused() {
    let lists: &'static [(&str, &[Kind])] =
        &[("model.layers.", &[&[40, 41, 42, 43, 44], &[0, 1, 2], &[92]])];
    Case {
        name: "glm-4.5",
        may_lack: &["embed_tokens.weight", "shared_head.head.weight"],
        ..same_in_both_layouts(lists)
    }
    .check();
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "true sizes: cargo test --release --test incomplete_releases"
)]
fn gpt_oss_20b_without_a_tensor_is_refused() {
    let lists: &'static [(&str, &[Kind])] = &[("model.layers.", &[&[10, 11, 12, 13, 14]])];
    Case { name: "gpt-oss-20b", ..same_in_both_layouts(lists) }.check();
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "true sizes: cargo test --release --test incomplete_releases"
)]
fn kimi_k2_5_without_a_tensor_is_refused() {
    Case {
        name: "kimi-k2.5",
        lists: &[
            ("language_model.model.layers.", &[&[30, 31, 32, 33, 34], &[0]]),
            ("vision_tower.encoder.blocks.", &[&[10, 11, 12, 13, 14]]),
        ],
        experts: EXPERTS,
        mlp: "mlp.",
        native_lists: &[
            ("model.language_model.model.layers.", &[&[30, 31, 32, 33, 34], &[0]]),
            ("model.vision_tower.encoder.blocks.", &[&[10, 11, 12, 13, 14]]),
        ],
        native_experts: EXPERTS,
        native_mlp: "mlp.",
        may_lack: &[],
    }
    .check();
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "true sizes: cargo test --release --test incomplete_releases"
)]
fn mimo_v2_flash_without_a_tensor_is_refused() {
    let lists: &'static [(&str, &[Kind])] = &[
        ("model.layers.", &[&[6, 7, 8, 9, 10], &[11, 17, 23, 29, 35], &[0]]),
        ("model.mtp.layers.", &[&[1, 2]]),
    ];
    Case { name: "mimo-v2-flash", ..same_in_both_layouts(lists) }.check();
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "true sizes: cargo test --release --test incomplete_releases"
)]
fn minimax_m2_7_without_a_tensor_is_refused() {
    let lists: &'static [(&str, &[Kind])] = &[("model.layers.", &[&[30, 31, 32, 33, 34]])];
    Case {
        name: "minimax-m2.7",
        lists,
        experts: "block_sparse_moe.experts.",
        mlp: "block_sparse_moe.",
        native_lists: lists,
        native_experts: EXPERTS,
        native_mlp: "mlp.",
        may_lack: &[],
    }
    .check();
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "true sizes: cargo test --release --test incomplete_releases"
)]
fn qwen3_235b_without_a_tensor_is_refused() {
    let lists: &'static [(&str, &[Kind])] = &[("model.layers.", &[&[30, 31, 32, 33, 34]])];
    Case { name: "qwen3-235b-a22b", ..same_in_both_layouts(lists) }.check();
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "true sizes: cargo test --release --test incomplete_releases"
)]
fn qwen3_vl_30b_without_a_tensor_is_refused() {
    let lists: &'static [(&str, &[Kind])] = &[
        ("model.language_model.layers.", &[&[30, 31, 32, 33, 34]]),
        ("model.visual.blocks.", &[&[10, 11, 12, 13, 14]]),
        ("model.visual.deepstack_merger_list.", &[&[0, 1, 2]]),
    ];
    Case { name: "qwen3-vl-30b-a3b", ..same_in_both_layouts(lists) }.check();
}
