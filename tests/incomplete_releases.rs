//! Releases at their true size that lack something: refused, and the message names what is missing.
//! Both the published files and those of the native layout.
//!
//! A checkpoint here lacks up to five tensors at once, in different layers of one kind where there
//! are as many: a message names five. Experts and whole parts of a layer are left out alone.

#[path = "common/release.rs"]
mod release;
#[path = "common/sparse.rs"]
mod sparse;
#[path = "common/table.rs"]
mod table;

use std::collections::{BTreeMap, BTreeSet};

use mount_ckpt::mapping::LayoutName;
use mount_ckpt::plan::PlanOptions;
use release::{Entry, Release, folded, plan};
use sparse::Sparse;

/// Names that a message lists of one kind of problem.
const LISTED: usize = 5;

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
        let entry = |t: &mount_ckpt::plan::TensorPlan| {
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

/// One checkpoint's missing matrices, each with what a message may say of it.
struct Damage<'a> {
    lacks: BTreeSet<&'a str>,
    named: Vec<Vec<String>>,
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

/// Groups of five at most, neighbours apart.
fn spread<T: Clone>(items: &[T]) -> Vec<Vec<T>> {
    let groups = items.len().div_ceil(LISTED);
    (0..groups).map(|g| items.iter().skip(g).step_by(groups).cloned().collect()).collect()
}

/// Single matrices: each is named in the message.
fn singles<'a>(
    whole: &'a Whole,
    lists: &[(&str, &'static [Kind])],
    may_lack: &[&str],
) -> Vec<Damage<'a>> {
    let mut groups: Vec<Vec<&'a str>> = spread(&of_the_model(whole));
    for (start, kinds) in lists {
        for kind in *kinds {
            let first = of_a_layer(whole, &format!("{start}{}.", kind[0]));
            let first = first.into_iter().filter(|name| !may_lack.contains(name));
            // Missing experts fill the message, and what stands beside them is not asked for then.
            let (experts, others): (Vec<&str>, Vec<&str>) =
                first.partition(|name| name.contains(".experts."));
            let experts = experts.into_iter().map(|name| vec![name]);
            for group in spread(&others).into_iter().chain(experts) {
                let layers = kind.iter().cycle();
                let full = group.iter().zip(layers).map(|(name, layer)| {
                    let full = format!("{start}{layer}.{name}");
                    let found = whole.matrices.get_key_value(&full);
                    found.unwrap_or_else(|| panic!("no `{full}`")).0.as_str()
                });
                groups.push(full.collect());
            }
        }
    }
    // One of two is missing: the message may name the other.
    let other = |name: &str| match name.strip_suffix("gate.tid2eid") {
        Some(start) if start.ends_with("ffn.") => Some(format!("`{start}gate.bias`")),
        Some(start) => Some(format!("`{start}gate.e_score_correction_bias`")),
        None => None,
    };
    let one = |name: &&str| [format!("`{name}`")].into_iter().chain(other(name)).collect();
    let named = |group: &Vec<&str>| group.iter().map(one).collect();
    groups
        .into_iter()
        .map(|group| Damage { named: named(&group), lacks: group.into_iter().collect() })
        .collect()
}

/// Whole parts of layers: a message names the layer, or something of it.
fn parts<'a>(
    whole: &'a Whole,
    lists: &[(&str, &'static [Kind])],
    experts: &str,
    mlp: &str,
) -> Vec<Damage<'a>> {
    let mut damages = Vec::new();
    let (start, kinds) = lists[0];
    let layer = kinds[0][0];
    let one = |part: &str| whole.within(&format!("{start}{layer}.{part}"));
    // A missing layer has its published name.
    let itself = || format!("layers.{layer}`");
    let named = || vec![vec![format!("`{start}{layer}.{experts}"), itself()]];
    damages.push(Damage { lacks: one(experts), named: named() });
    let named = || vec![vec![format!("`{start}{layer}.{mlp}"), itself()]];
    damages.push(Damage { lacks: one(mlp), named: named() });
    damages.push(Damage { lacks: one(""), named: vec![vec![itself()]] });
    let of_any = |name: &&str| {
        name.strip_prefix(start)
            .and_then(|rest| rest.split_once('.'))
            .is_some_and(|(_, rest)| rest.starts_with(experts))
    };
    let every = whole.matrices.keys().map(String::as_str).filter(of_any).collect();
    damages.push(Damage { lacks: every, named: vec![vec![experts.to_owned()]] });
    damages
}

/// Refuses damages that a plan accepts, or does not name.
fn check_whole(
    what: &str,
    whole: &Whole,
    damages: &[Damage<'_>],
    layouts: &[LayoutName],
) -> Vec<String> {
    let mut failures = Vec::new();
    let mut fail = |failure: String| {
        println!("  FAILS {failure}");
        failures.push(failure);
    };
    for damage in damages {
        let first: Vec<_> = damage.lacks.iter().take(LISTED).collect();
        for &layout in layouts {
            let case = || format!("{what} to {layout}, without {} {first:?}", damage.lacks.len());
            assert!(
                !damage.lacks.is_empty(),
                "{what}: nothing to leave out for {:?}",
                damage.named
            );
            match whole.without(&damage.lacks, layout) {
                Ok(()) => fail(format!("{}: accepted", case())),
                Err(message) => {
                    let unnamed = damage.named.iter().filter(|one_of| {
                        !one_of.iter().any(|part| message.contains(part.as_str()))
                    });
                    for one_of in unnamed {
                        fail(format!("{}: {one_of:?} is not named: {message}", case()));
                    }
                }
            }
        }
    }
    failures
}

impl Case {
    fn check(&self) {
        let release = Release::read(self.name);
        let published = Whole::published(&release);
        let native = Whole::native(&published, &release);
        let mut damages = singles(&published, self.lists, self.may_lack);
        damages.extend(parts(&published, self.lists, self.experts, self.mlp));
        let what = format!("{}, published", self.name);
        let mut failures = check_whole(&what, &published, &damages, &[LayoutName::Native]);
        let mut damages = singles(&native, self.native_lists, self.may_lack);
        damages.extend(parts(&native, self.native_lists, self.native_experts, self.native_mlp));
        let what = format!("{}, native", self.name);
        failures.extend(check_whole(&what, &native, &damages, &[LayoutName::Hf]));
        assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    }
}

const EXPERTS: &str = "mlp.experts.";

#[test]
fn deepseek_v3_without_a_tensor_is_refused() {
    let lists: &[(&str, &[Kind])] =
        &[("model.layers.", &[&[30, 31, 32, 33, 34], &[0, 1, 2], &[61]])];
    Case {
        name: "deepseek-v3",
        lists,
        experts: EXPERTS,
        mlp: "mlp.",
        native_lists: lists,
        native_experts: EXPERTS,
        native_mlp: "mlp.",
        may_lack: &["embed_tokens.weight", "shared_head.head.weight"],
    }
    .check();
}

#[test]
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
fn glm_4_5_without_a_tensor_is_refused() {
    let lists: &[(&str, &[Kind])] =
        &[("model.layers.", &[&[40, 41, 42, 43, 44], &[0, 1, 2], &[92]])];
    Case {
        name: "glm-4.5",
        lists,
        experts: EXPERTS,
        mlp: "mlp.",
        native_lists: lists,
        native_experts: EXPERTS,
        native_mlp: "mlp.",
        may_lack: &["embed_tokens.weight", "shared_head.head.weight"],
    }
    .check();
}

#[test]
fn gpt_oss_20b_without_a_tensor_is_refused() {
    let lists: &[(&str, &[Kind])] = &[("model.layers.", &[&[10, 11, 12, 13, 14]])];
    Case {
        name: "gpt-oss-20b",
        lists,
        experts: EXPERTS,
        mlp: "mlp.",
        native_lists: lists,
        native_experts: EXPERTS,
        native_mlp: "mlp.",
        may_lack: &[],
    }
    .check();
}

#[test]
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
fn mimo_v2_flash_without_a_tensor_is_refused() {
    let lists: &[(&str, &[Kind])] = &[
        ("model.layers.", &[&[6, 7, 8, 9, 10], &[11, 17, 23, 29, 35], &[0]]),
        ("model.mtp.layers.", &[&[1, 2]]),
    ];
    Case {
        name: "mimo-v2-flash",
        lists,
        experts: EXPERTS,
        mlp: "mlp.",
        native_lists: lists,
        native_experts: EXPERTS,
        native_mlp: "mlp.",
        may_lack: &[],
    }
    .check();
}

#[test]
fn minimax_m2_7_without_a_tensor_is_refused() {
    let lists: &[(&str, &[Kind])] = &[("model.layers.", &[&[30, 31, 32, 33, 34]])];
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
fn qwen3_235b_without_a_tensor_is_refused() {
    let lists: &[(&str, &[Kind])] = &[("model.layers.", &[&[30, 31, 32, 33, 34]])];
    Case {
        name: "qwen3-235b-a22b",
        lists,
        experts: EXPERTS,
        mlp: "mlp.",
        native_lists: lists,
        native_experts: EXPERTS,
        native_mlp: "mlp.",
        may_lack: &[],
    }
    .check();
}

#[test]
fn qwen3_vl_30b_without_a_tensor_is_refused() {
    let lists: &[(&str, &[Kind])] = &[
        ("model.language_model.layers.", &[&[30, 31, 32, 33, 34]]),
        ("model.visual.blocks.", &[&[10, 11, 12, 13, 14]]),
        ("model.visual.deepstack_merger_list.", &[&[0, 1, 2]]),
    ];
    Case {
        name: "qwen3-vl-30b-a3b",
        lists,
        experts: EXPERTS,
        mlp: "mlp.",
        native_lists: lists,
        native_experts: EXPERTS,
        native_mlp: "mlp.",
        may_lack: &[],
    }
    .check();
}
