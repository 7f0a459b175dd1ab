//! The published releases at their true size: every layout shows every tensor of theirs, and what
//! was saved in a layout goes back to the files that it came from.
//!
//! `tests/releases/README.md` says where the tables come from. Their checkpoints have holes for data,
//! so only names, dtypes, shapes, sizes and config.json are compared; `families.rs` compares numbers,
//! on toys.
//!
//! Each test prints the time and the peak memory of its plans. They mean something one at a time:
//! `cargo test --release --test releases -- --nocapture --test-threads 1`.

#[path = "common/release.rs"]
mod release;
#[path = "common/sparse.rs"]
mod sparse;
#[path = "common/table.rs"]
mod table;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use mount_ckpt::mapping::LayoutName;
use mount_ckpt::plan::{Body, Origin, Plan, PlanOptions, Quantize, Unmapped};
use mount_ckpt::read::{Engine, EngineOptions};
use mount_ckpt::source::Checkpoint;
use mount_ckpt::view::{Ino, View, ViewOptions};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use release::{Entry, Folded, Release, Tensors, folded, plan, total_bytes};
use sparse::Sparse;

const LAYOUTS: [LayoutName; 3] = [LayoutName::Native, LayoutName::Transformers, LayoutName::Hf];

/// Lists in a `quantization_config` of what stays plain: those of the releases follow no one rule.
const IGNORE_LISTS: [&str; 3] = ["ignore", "ignored_layers", "modules_to_not_convert"];

/// A view and the plan behind it.
struct Shown {
    engine: Arc<Engine>,
    checkpoint: Arc<Checkpoint>,
    config: Value,
    config_text: Vec<u8>,
    index: Index,
    seconds: [f64; 2],
}

#[derive(Deserialize)]
struct Index {
    metadata: Metadata,
    weight_map: HashMap<String, IgnoredAny>,
}

#[derive(Deserialize)]
struct Metadata {
    total_size: u64,
}

/// The view of a checkpoint, planned as the command line does.
fn show(dir: &Path, options: &PlanOptions) -> Result<Shown, String> {
    let start = Instant::now();
    let (checkpoint, plan) = plan(dir, options)?;
    let planned = start.elapsed();
    let options = EngineOptions { cache_bytes: 64 << 20, keep_given: false, threads: 1 };
    let engine = Arc::new(Engine::new(Arc::clone(&checkpoint), Arc::new(plan), options));
    let view = View::build(Arc::clone(&engine), Arc::clone(&checkpoint), &ViewOptions::default());
    let view = view.map_err(|e| e.to_string())?;
    let seconds = [planned, start.elapsed() - planned].map(|t| t.as_secs_f64());
    let config_text = file(&view, "config.json");
    Ok(Shown {
        config: serde_json::from_slice(&config_text).unwrap(),
        index: serde_json::from_slice(&file(&view, "model.safetensors.index.json")).unwrap(),
        config_text,
        engine,
        checkpoint,
        seconds,
    })
}

fn file(view: &View, name: &str) -> Vec<u8> {
    let attr = view.lookup(Ino::ROOT, OsStr::new(name)).unwrap();
    let mut bytes = vec![0; usize::try_from(attr.size).unwrap()];
    assert_eq!(view.read(attr.ino, 0, &mut bytes).unwrap(), bytes.len());
    bytes
}

impl Shown {
    fn plan(&self) -> &Plan {
        self.engine.plan()
    }

    /// Name, dtype and shape of every tensor of the view, in its order.
    fn entries(&self) -> Vec<Entry> {
        let ids = self.plan().directories[0].tensors.iter();
        let tensors = ids.map(|id| self.plan().tensor(*id));
        let entry = |t: &mount_ckpt::plan::TensorPlan| {
            (t.name.to_string(), t.dtype.name().to_owned(), t.shape.dims().to_vec())
        };
        tensors.map(entry).collect()
    }

    fn tensors(&self) -> Tensors {
        self.entries().into_iter().map(|(name, dtype, shape)| (name, (dtype, shape))).collect()
    }

    /// Matrices of the source that the view has nothing of.
    fn lost(&self, matrices: &Folded) -> BTreeSet<String> {
        let plan = self.plan();
        let name = |id| &*self.checkpoint.tensor(id).name;
        let mut served: BTreeSet<&str> = BTreeSet::new();
        for tensor in &plan.tensors {
            match &tensor.body {
                Body::Verbatim(runs) => {
                    let runs = runs.iter().filter(|run| run.origin == Origin::Source);
                    served.extend(runs.map(|run| name(run.source)));
                }
                Body::Computed(computed) => served.extend(
                    computed.fragments.iter().map(|f| name(plan.matrix(f.matrix).payload)),
                ),
                Body::Encoded(_) | Body::Literal(_) => {}
            }
        }
        let payloads = matrices.payloads.iter();
        let lost = payloads.filter(|(_, payload)| !served.contains(payload.as_str()));
        lost.map(|(matrix, _)| matrix.clone()).collect()
    }

    /// Tensors that the mapping's rules left out.
    fn dropped(&self) -> u64 {
        self.plan().summary.dropped.values().sum()
    }
}

/// Refuses the first differences.
fn assert_same(what: &str, got: &Tensors, expected: &Tensors) {
    let missing = expected.iter().filter(|(name, _)| !got.contains_key(*name));
    let missing: Vec<_> = missing.map(|(name, _)| name).collect();
    let beside: Vec<_> = got.keys().filter(|name| !expected.contains_key(*name)).collect();
    let differs = expected.iter().filter_map(|(name, tensor)| {
        let got = got.get(name).filter(|got| *got != tensor)?;
        Some(format!("`{name}`: expected {tensor:?}, got {got:?}"))
    });
    let differs: Vec<String> = differs.collect();
    let first = |names: &[&String]| names.iter().take(5).map(|n| (*n).clone()).collect::<Vec<_>>();
    assert!(
        missing.is_empty() && beside.is_empty() && differs.is_empty(),
        "{what}: {} missing {:?}, {} beside {:?}, {} differ {:?}",
        missing.len(),
        first(&missing),
        beside.len(),
        first(&beside),
        differs.len(),
        &differs[..differs.len().min(5)]
    );
}

/// Elements of each dtype.
fn elements(tensors: &Tensors) -> BTreeMap<&str, u64> {
    let mut sums = BTreeMap::new();
    for (dtype, shape) in tensors.values() {
        *sums.entry(dtype.as_str()).or_default() += shape.iter().product::<u64>();
    }
    sums
}

/// `quantization_config` objects with the key of the object that they stand in, and everything else.
fn split(config: &Value) -> (Vec<(String, Value)>, Value) {
    const KEY: &str = "quantization_config";
    let mut rest = config.clone();
    let top = rest.as_object_mut().unwrap();
    let mut found: Vec<(String, Value)> =
        top.shift_remove(KEY).into_iter().map(|value| (String::new(), value)).collect();
    for (name, value) in top.iter_mut() {
        let value = value.as_object_mut().and_then(|object| object.shift_remove(KEY));
        found.extend(value.map(|value| (name.clone(), value)));
    }
    found.retain(|(_, value)| !value.is_null());
    (found, rest)
}

/// Without nulls and lists of what stays plain.
fn bare(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            let kept = object.iter().filter(|(key, value)| {
                !value.is_null() && !IGNORE_LISTS.contains(&key.as_str())
            });
            kept.map(|(key, value)| (key.clone(), bare(value))).collect()
        }
        other => other.clone(),
    }
}

/// The config.json of a plain view: the release's without its quantization.
fn assert_plain_config(what: &str, got: &Value, release: &Value) {
    let (quantization, rest) = split(got);
    assert!(quantization.is_empty(), "{what}: config.json has {quantization:?}");
    assert_eq!(rest, split(release).1, "{what}: config.json");
}

/// The config.json of a view that is quantized as the release is.
fn assert_quantized_config(what: &str, got: &Value, release: &Value, to_the_letter: bool) {
    let ((got, rest), (expected, expected_rest)) = (split(got), split(release));
    assert_eq!(rest, expected_rest, "{what}: config.json");
    if to_the_letter {
        assert_eq!(got, expected, "{what}: quantization_config");
        return;
    }
    let bare = |found: Vec<(String, Value)>| -> Vec<(String, Value)> {
        found.into_iter().map(|(within, value)| (within, bare(&value))).collect()
    };
    assert_eq!(bare(got), bare(expected), "{what}: quantization_config");
}

/// Peak resident memory in MiB since the last call.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    // Another kernel than Linux has no such file, and the numbers are only printed.
    let _ = fs::write("/proc/self/clear_refs", "5");
    kib.unwrap_or(0) / 1024
}

fn to(layout: LayoutName) -> PlanOptions {
    PlanOptions { to: Some(layout), ..PlanOptions::default() }
}

/// A release and what of it is expected to be lost.
struct Case {
    name: &'static str,
    /// Parts of the names that the layout `transformers` leaves out: it has no MTP layers.
    no_transformers: &'static [&'static str],
    /// Whether the mapping can quantize as the release is, without an original.
    back_by_mapping: bool,
}

const fn case(name: &'static str) -> Case {
    Case { name, no_transformers: &[], back_by_mapping: true }
}

impl Case {
    const fn without(self, parts: &'static [&'static str]) -> Case {
        Case { no_transformers: parts, ..self }
    }

    const fn by_original_only(self) -> Case {
        Case { back_by_mapping: false, ..self }
    }

    fn loses(&self, layout: LayoutName, name: &str) -> bool {
        match layout {
            LayoutName::Transformers => self.no_transformers.iter().any(|p| name.contains(p)),
            LayoutName::Native | LayoutName::Hf => false,
        }
    }

    fn kept(&self, layout: LayoutName, tensors: &Tensors) -> Tensors {
        let kept = tensors.iter().filter(|(name, _)| !self.loses(layout, name));
        kept.map(|(name, tensor)| (name.clone(), tensor.clone())).collect()
    }

    fn check(&self) {
        self.check_release(&Release::read(self.name));
    }

    fn check_release(&self, release: &Release) {
        let stored = release.tensors();
        let sparse = release.write();
        let tb = total_bytes(&stored) as f64 / 1e12;
        println!("{}: {} tensors, {tb:.3} TB", self.name, stored.len());
        let matrices = folded(&stored);
        let quantized = matrices.tensors != stored;
        for layout in LAYOUTS {
            let what = format!("{}, {layout}", self.name);
            peak();
            let shown = show(sparse.path(), &to(layout)).unwrap_or_else(|e| panic!("{what}: {e}"));
            let [plan, view] = shown.seconds;
            let peak = peak();
            println!(
                "  {layout:12}: plan {plan:.2} s, view {view:.2} s, peak {peak} MiB"
            );
            self.check_view(&what, layout, &shown, &matrices);
            assert_plain_config(&what, &shown.config, &release.config());
            if layout != LayoutName::Hf {
                let files = [("config.json".to_owned(), shown.config_text.clone())];
                let saved = Sparse::write(&shown.entries(), &files);
                drop(shown);
                self.check_back(layout, &saved, release, &sparse, quantized);
            }
        }
    }

    fn check_view(&self, what: &str, layout: LayoutName, shown: &Shown, matrices: &Folded) {
        let (got, expected) = (shown.tensors(), self.kept(layout, &matrices.tensors));
        match layout {
            LayoutName::Hf => assert_same(what, &got, &expected),
            LayoutName::Native | LayoutName::Transformers => {
                assert_eq!(elements(&got), elements(&expected), "{what}: elements");
            }
        }
        let lost = matrices.tensors.keys().filter(|name| self.loses(layout, name));
        assert_eq!(shown.lost(matrices), lost.cloned().collect(), "{what}: lost");
        let dropped = matrices.tensors.len() - expected.len();
        assert_eq!(shown.dropped(), dropped as u64, "{what}: dropped");
        assert_eq!(shown.index.metadata.total_size, total_bytes(&got), "{what}: total_size");
        assert!(
            shown.index.weight_map.len() == got.len()
                && got.keys().all(|name| shown.index.weight_map.contains_key(name)),
            "{what}: index"
        );
    }

    /// The way back of what was saved in a layout.
    fn check_back(
        &self,
        from: LayoutName,
        saved: &Sparse,
        release: &Release,
        original: &Sparse,
        quantized: bool,
    ) {
        let expected = self.kept(from, &release.tensors());
        let original = || Some(Arc::new(Checkpoint::open(original.path()).unwrap()));
        let quantize = |original| Some(Quantize { original, ..Quantize::default() });
        let ways = match quantized {
            true => vec![("by the mapping", quantize(None)), ("by the original", quantize(original()))],
            false => vec![("plain", None)],
        };
        for (way, quantize) in ways {
            let what = format!("{}, from {from} {way}", self.name);
            let by_original = quantize.as_ref().is_some_and(|q| q.original.is_some());
            let is_plain = quantize.is_none();
            peak();
            let shown = show(saved.path(), &PlanOptions { quantize, ..to(LayoutName::Hf) });
            if !is_plain && !by_original && !self.back_by_mapping {
                let message = shown.err().unwrap_or_else(|| panic!("{what}: expected a refusal"));
                assert!(message.contains("--scales-from"), "{what}: {message}");
                continue;
            }
            let shown = shown.unwrap_or_else(|e| panic!("{what}: {e}"));
            let (got, [plan, view], peak) = (shown.tensors(), shown.seconds, peak());
            println!(
                "  {from} -> hf {way}: plan {plan:.2} s, view {view:.2} s, peak {peak} MiB"
            );
            assert_same(&what, &got, &expected);
            assert_eq!(shown.index.metadata.total_size, total_bytes(&expected), "{what}");
            assert_eq!(shown.index.weight_map.len(), expected.len(), "{what}: index");
            match is_plain {
                true => assert_plain_config(&what, &shown.config, &release.config()),
                false => {
                    assert_quantized_config(&what, &shown.config, &release.config(), by_original);
                }
            }
        }
    }
}

fn check(cases: &[Case]) {
    cases.iter().for_each(Case::check);
}

#[test]
fn deepseek_v3_is_shown_and_goes_back() {
    check(&[case("deepseek-v3").without(&["model.layers.61."])]);
}

#[test]
fn kimi_k2_is_shown_and_goes_back() {
    check(&[case("kimi-k2-instruct").without(&["rotary_emb.inv_freq"])]);
}

#[test]
fn deepseek_v4_flash_is_shown_and_goes_back() {
    check(&[case("deepseek-v4-flash").without(&["mtp."])]);
}

#[test]
fn deepseek_v4_flash_0731_is_shown_and_goes_back() {
    check(&[case("deepseek-v4-flash-0731").without(&["mtp."])]);
}

#[test]
fn deepseek_v4_base_is_shown_and_goes_back() {
    check(&[case("deepseek-v4-flash-base").without(&["mtp."])]);
}

#[test]
fn glm_4_5_is_shown_and_goes_back() {
    check(&[
        case("glm-4.5").without(&["model.layers.92."]),
        case("glm-4.5-air").without(&["model.layers.46."]),
    ]);
}

#[test]
fn glm_4_5_fp8_is_shown_and_goes_back_by_its_original() {
    check(&[
        case("glm-4.5-fp8").without(&["model.layers.92."]).by_original_only(),
        case("glm-4.5-air-fp8").without(&["model.layers.46."]).by_original_only(),
    ]);
}

/// GLM-4.6 and others leave their MTP layer without embedding and head: they are the model's own.
#[test]
fn an_mtp_layer_without_embedding_and_head_is_shown_and_goes_back() {
    let mut release = Release::read("glm-4.5");
    let shared = ["model.layers.92.embed_tokens.weight", "model.layers.92.shared_head.head.weight"];
    let before = release.entries.len();
    release.entries.retain(|(name, ..)| !shared.contains(&name.as_str()));
    assert_eq!(release.entries.len(), before - 2);
    case("glm-4.5").without(&["model.layers.92."]).check_release(&release);
}

#[test]
fn gpt_oss_is_shown_and_goes_back() {
    check(&[case("gpt-oss-20b"), case("gpt-oss-20b-bf16")]);
}

#[test]
fn kimi_k2_5_is_shown_and_goes_back() {
    check(&[case("kimi-k2.5")]);
}

#[test]
fn mimo_v2_flash_is_shown_and_goes_back() {
    check(&[case("mimo-v2-flash").without(&["model.mtp."])]);
}

#[test]
fn minimax_m2_is_shown_and_goes_back() {
    check(&[case("minimax-m2.7")]);
}

#[test]
fn qwen3_moe_is_shown_and_goes_back() {
    check(&[
        case("qwen3-235b-a22b"),
        case("qwen3-30b-a3b"),
        case("qwen3-30b-a3b-v5config"),
    ]);
}

#[test]
fn qwen3_moe_fp8_is_shown_and_goes_back() {
    check(&[
        case("qwen3-235b-a22b-fp8"),
        case("qwen3-235b-a22b-2507-fp8"),
        case("qwen3-30b-a3b-fp8"),
    ]);
}

#[test]
fn qwen3_vl_moe_is_shown_and_goes_back() {
    check(&[case("qwen3-vl-30b-a3b"), case("qwen3-vl-30b-a3b-fp8")]);
}

/// Releases whose quantization has no decoder here, and a part of its tensors' names.
const REFUSED: [(&str, &str); 3] = [
    ("deepseek-v3.1-nvfp4", "weight_scale_2"),
    ("qwen3-30b-a3b-awq", "qzeros"),
    ("qwen3-30b-a3b-gptq-int4", "qzeros"),
];

#[test]
fn quantizations_without_a_decoder_are_refused_by_name() {
    for (name, part) in REFUSED {
        let sparse = Release::read(name).write();
        for layout in LAYOUTS {
            for unmapped in [Unmapped::Refuse, Unmapped::Keep, Unmapped::Drop] {
                let what = format!("{name}, {layout}, {unmapped:?}");
                let shown = show(sparse.path(), &PlanOptions { unmapped, ..to(layout) });
                let message = shown.err().unwrap_or_else(|| panic!("{what}: expected a refusal"));
                let heading = "parts of a quantization that is not supported";
                assert!(message.contains(heading) && message.contains(part), "{what}: {message}");
            }
        }
    }
}
