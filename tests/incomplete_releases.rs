//! Releases at their true size that lack something: refused, and the message names what is missing.
//! Both the published files and those of the native layout.
//!
//! Opening a release takes longer than looking for what is missing, so a checkpoint here lacks many
//! tensors at once, a few of each layer. The message names five and counts all; where the count is
//! wrong, five at a time are left out, and each must be named. Experts and whole parts of a layer are
//! left out alone.

#[path = "common/release.rs"]
mod release;
#[path = "common/sparse.rs"]
mod sparse;
#[path = "common/table.rs"]
mod table;

use std::collections::{BTreeMap, BTreeSet};

use mount_ckpt::{LayoutName, PlanOptions};
use release::{Entry, Release, folded, plan};
use sparse::Sparse;

/// Names that a message lists of one kind of problem.
const LISTED: usize = 5;

/// Checkpoints over which the single tensors of a release are spread.
const ROUNDS: usize = 3;

/// Layers of one kind: all have the same tensors.
type Kind = &'static [u64];

/// A release, and the layers that lose something.
struct Case {
    name: &'static str,
    /// What stands before the index of a layer in the published names, and kinds of such layers.
    lists: &'static [(&'static str, &'static [Kind])],
    /// What a layer's experts and its whole MLP begin with, within the layer.
    experts: &'static str,
    mlp: &'static str,
    /// The same in the native layout.
    native_lists: &'static [(&'static str, &'static [Kind])],
    native_experts: &'static str,
    native_mlp: &'static str,
    /// What a layer may lack: an MTP layer without an embedding or a head uses the model's own.
    may_lack: &'static [&'static str],
}

/// A release whose layers have the same prefixes, experts and MLP in both layouts, and lack nothing.
const fn alike(lists: &'static [(&'static str, &'static [Kind])]) -> Case {
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

/// A checkpoint directory, and which of its matrices each stored tensor belongs to.
struct Whole {
    sparse: Sparse,
    /// Names of the stored tensors of each matrix.
    matrices: BTreeMap<String, Vec<String>>,
}

impl Whole {
    fn published(release: &Release) -> Whole {
        let stored = release.tensors();
        let folded = folded(&stored);
        let mut matrices: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (matrix, payload) in &folded.payloads {
            matrices.entry(matrix.clone()).or_default().push(payload.clone());
        }
        for (part, matrix) in &folded.parts {
            matrices.get_mut(matrix).unwrap().push(part.clone());
        }
        Whole { sparse: release.write(), matrices }
    }

    /// The native layout of a checkpoint.
    fn native(published: &Whole, release: &Release) -> Whole {
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
        Whole { sparse: Sparse::write(&entries, &files), matrices: matrices.collect() }
    }

    /// What is said of the checkpoint without some matrices, for a view in a layout.
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

/// Matrices that a checkpoint lacks, each with what a message may say of it.
type Single<'a> = (&'a str, Vec<String>);

/// What a checkpoint lacks.
enum Damage<'a> {
    /// Single matrices, each of which is missed.
    Singles(Vec<Single<'a>>),
    /// A part of a layer or of all: the message says one of these.
    Part(BTreeSet<&'a str>, Vec<String>),
}

/// Whether a part of a name is a number.
fn is_index(part: &str) -> bool {
    part.bytes().all(|b| b.is_ascii_digit())
}

/// Matrices without an index in their names: those of the whole model.
fn of_the_model(whole: &Whole) -> Vec<&str> {
    let names = whole.matrices.keys().map(String::as_str);
    names.filter(|name| !name.split('.').any(is_index)).collect()
}

/// Matrices of a layer by their names within it; of the experts only number 7.
fn of_a_layer<'a>(whole: &'a Whole, start: &str) -> Vec<&'a str> {
    let names = whole.within(start).into_iter().map(|name| &name[start.len()..]);
    names.filter(|name| name.split('.').filter(|p| is_index(p)).all(|part| part == "7")).collect()
}

/// What a message may say of a missing matrix: its name or, of two of which there must be one, the
/// other's.
fn single(name: &str) -> Single<'_> {
    let other = name.strip_suffix("gate.tid2eid").map(|start| match start.ends_with("ffn.") {
        true => format!("`{start}gate.bias`"),
        false => format!("`{start}gate.e_score_correction_bias`"),
    });
    (name, [format!("`{name}`")].into_iter().chain(other).collect())
}

/// All single matrices of the model and of a layer of each kind.
fn singles<'a>(
    whole: &'a Whole,
    lists: &[(&str, &'static [Kind])],
    may_lack: &[&str],
) -> Vec<Damage<'a>> {
    let mut rounds: Vec<Vec<Single<'a>>> = vec![Vec::new(); ROUNDS];
    let mut alone = Vec::new();
    for (i, name) in of_the_model(whole).into_iter().enumerate() {
        rounds[i % ROUNDS].push(single(name));
    }
    for (start, kinds) in lists {
        for kind in *kinds {
            let first = of_a_layer(whole, &format!("{start}{}.", kind[0]));
            let first = first.into_iter().filter(|name| !may_lack.contains(name));
            for (i, name) in first.enumerate() {
                let layer = kind[(i / ROUNDS) % kind.len()];
                let full = format!("{start}{layer}.{name}");
                let found = whole.matrices.get_key_value(&full);
                let (full, _) = found.unwrap_or_else(|| panic!("no `{full}`"));
                // What stands beside experts is not asked for where there are none.
                match name.contains(".experts.") {
                    true => alone.push(vec![single(full)]),
                    false => rounds[i % ROUNDS].push(single(full)),
                }
            }
        }
    }
    rounds.extend(alone);
    rounds.into_iter().filter(|round| !round.is_empty()).map(Damage::Singles).collect()
}

/// Whole parts of layers: a message names the layer, or something of it.
fn parts<'a>(
    whole: &'a Whole,
    lists: &[(&str, &'static [Kind])],
    experts: &str,
    mlp: &str,
) -> Vec<Damage<'a>> {
    let (start, kinds) = lists[0];
    let layer = kinds[0][0];
    let one = |part: &str| whole.within(&format!("{start}{layer}.{part}"));
    // A missing layer has its published name.
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
    parts.into_iter().map(|(lacks, named)| Damage::Part(lacks, named)).collect()
}

/// How many tensors a message says are missing.
fn counted(message: &str) -> usize {
    let missing = message.split("; ").filter(|kind| kind.contains(" missing tensor"));
    missing.filter_map(|kind| kind.split(' ').next()?.parse::<usize>().ok()).sum()
}

/// Checkpoints that a plan accepts, or whose message does not say what is missing.
fn faults(what: &str, whole: &Whole, damages: &[Damage<'_>], layout: LayoutName) -> Vec<String> {
    let mut faults = Vec::new();
    let mut fault = |fault: String| {
        println!("  FAILS {what}: {fault}");
        faults.push(format!("{what}: {fault}"));
    };
    for damage in damages {
        match damage {
            Damage::Part(lacks, named) => {
                assert!(!lacks.is_empty(), "{what}: nothing to leave out for {named:?}");
                let first = lacks.first().unwrap();
                match whole.without(lacks, layout) {
                    Ok(()) => fault(format!("accepted without {} from `{first}` on", lacks.len())),
                    Err(message) if named.iter().any(|part| message.contains(part)) => {}
                    Err(message) => fault(format!("none of {named:?} is named: {message}")),
                }
            }
            Damage::Singles(singles) => {
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
        let published = Whole::published(&release);
        let native = Whole::native(&published, &release);
        let mut damages = singles(&published, self.lists, self.may_lack);
        damages.extend(parts(&published, self.lists, self.experts, self.mlp));
        let what = format!("{}, published", self.name);
        let mut failures = faults(&what, &published, &damages, LayoutName::Native);
        let mut damages = singles(&native, self.native_lists, self.may_lack);
        damages.extend(parts(&native, self.native_lists, self.native_experts, self.native_mlp));
        let what = format!("{}, native", self.name);
        failures.extend(faults(&what, &native, &damages, LayoutName::Hf));
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
        ..alike(lists)
    }
    .check();
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "true sizes: cargo test --release --test incomplete_releases"
)]
fn deepseek_v4_flash_without_a_tensor_is_refused() {
    // With an indexer, with a compressor alone, with neither, with an indexer and routed by token id.
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
        ..alike(lists)
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
    Case { name: "gpt-oss-20b", ..alike(lists) }.check();
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
    Case { name: "mimo-v2-flash", ..alike(lists) }.check();
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
    Case { name: "qwen3-235b-a22b", ..alike(lists) }.check();
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
    Case { name: "qwen3-vl-30b-a3b", ..alike(lists) }.check();
}
