//! Published releases at full size: views in every layout have every tensor, and a checkpoint saved
//! in a layout converts back to the published tensors.
//!
//! `tests/releases/README.md` gives the sources of the tables. The checkpoints are sparse files, so
//! only names, dtypes, shapes, sizes and config.json are compared; `families.rs` compares values,
//! with small checkpoints.
//!
//! Each test prints the time and the peak memory of its plans. They are meaningful only if one test
//! runs at a time: `cargo test --release --test releases -- --nocapture --test-threads 1`.

mod common;
#[path = "common/release.rs"]
mod release;
#[path = "common/sparse.rs"]
mod sparse;
#[path = "common/table.rs"]
mod table;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use common::file_of_view;
use mount_ckpt::{
    Checkpoint, Engine, EngineOptions, LayoutName, Plan, PlanOptions, Quantize, TensorPlan,
    Unmapped, View, ViewOptions,
};
use release::{Entry, LogicalTensors, Release, Tensors, logical_tensors, plan, total_bytes};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use sparse::Sparse;

const LAYOUTS: [LayoutName; 3] = [LayoutName::Native, LayoutName::Transformers, LayoutName::Hf];

/// Keys of a `quantization_config` that list unquantized modules. The releases have no common rule
/// for them.
const IGNORE_LISTS: [&str; 3] = ["ignore", "ignored_layers", "modules_to_not_convert"];

/// An engine with its plan, and the text files of its view.
struct PlannedView {
    engine: Arc<Engine>,
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

/// Plans a view of a checkpoint as the command line does.
fn show(dir: &Path, options: &PlanOptions) -> Result<PlannedView, String> {
    let start = Instant::now();
    let (checkpoint, plan) = plan(dir, options)?;
    let planned = start.elapsed();
    let options = EngineOptions { cache_bytes: 64 << 20, direct_io: false, threads: 1 };
    let engine = Arc::new(Engine::new(checkpoint, Arc::new(plan), options));
    let view = View::new(Arc::clone(&engine), &ViewOptions::default());
    let view = view.map_err(|e| e.to_string())?;
    let seconds = [planned, start.elapsed() - planned].map(|t| t.as_secs_f64());
    let config_text = file_of_view(&view, "config.json");
    Ok(PlannedView {
        config: serde_json::from_slice(&config_text).unwrap(),
        index: serde_json::from_slice(&file_of_view(&view, "model.safetensors.index.json"))
            .unwrap(),
        config_text,
        engine,
        seconds,
    })
}

impl PlannedView {
    fn plan(&self) -> &Plan {
        self.engine.plan()
    }

    /// Name, dtype and shape of every tensor of the view, in its order.
    fn entries(&self) -> Vec<Entry> {
        let ids = self.plan().directories[0].tensors.iter();
        let tensors = ids.map(|id| self.plan().tensor(*id));
        let entry = |t: &TensorPlan| {
            (t.name.to_string(), t.dtype.name().to_owned(), t.shape.dims().to_vec())
        };
        tensors.map(entry).collect()
    }

    fn tensors(&self) -> Tensors {
        self.entries().into_iter().map(|(name, dtype, shape)| (name, (dtype, shape))).collect()
    }

    /// Matrices of the source from which the view has no tensor.
    fn unserved(&self, matrices: &LogicalTensors) -> BTreeSet<String> {
        let plan = self.plan();
        let served: BTreeSet<&str> = plan.tensors.iter().flat_map(|t| plan.made_of(t)).collect();
        let all = matrices.payloads.keys();
        all.filter(|matrix| !served.contains(matrix.as_str())).cloned().collect()
    }

    /// The number of tensors that rules of the mapping dropped.
    fn dropped(&self) -> u64 {
        self.plan().summary.dropped.values().sum()
    }
}

/// All differences that a test has found.
#[derive(Default)]
struct Failures(Vec<String>);

impl Failures {
    fn add(&mut self, failure: String) {
        println!("  FAILS {failure}");
        self.0.push(failure);
    }

    fn equal<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, got: &T, expected: &T) {
        if got != expected {
            self.add(format!("{what}: expected {expected:?}, got {got:?}"));
        }
    }

    /// Adds the first differences between two lists of tensors.
    fn same(&mut self, what: &str, got: &Tensors, expected: &Tensors) {
        let only = |a: &Tensors, b: &Tensors| -> Vec<String> {
            a.keys().filter(|name| !b.contains_key(*name)).cloned().collect()
        };
        let differs = expected.iter().filter_map(|(name, tensor)| {
            let got = got.get(name).filter(|got| *got != tensor)?;
            Some(format!("`{name}`: expected {tensor:?}, got {got:?}"))
        });
        let kinds = [
            ("missing", only(expected, got)),
            ("not expected", only(got, expected)),
            ("different", differs.collect()),
        ];
        for (kind, names) in kinds.iter().filter(|(_, names)| !names.is_empty()) {
            let first = &names[..names.len().min(5)];
            self.add(format!("{what}: {} {kind}: {first:?}", names.len()));
        }
    }

    /// config.json of an unquantized view must be that of the release without its quantization.
    fn plain_config(&mut self, what: &str, got: &Value, release: &Value) {
        let (quantization, rest) = split_quantization(got);
        self.equal(&format!("{what}: quantization_config"), &quantization, &Vec::new());
        self.equal(&format!("{what}: config.json"), &rest, &split_quantization(release).1);
    }

    /// config.json of a quantized view must be that of the release. Unless `exact`, nulls and lists
    /// of unquantized modules are not compared.
    fn quantized_config(&mut self, what: &str, got: &Value, release: &Value, exact: bool) {
        let ((mut got, rest), (mut expected, expected_rest)) =
            (split_quantization(got), split_quantization(release));
        self.equal(&format!("{what}: config.json"), &rest, &expected_rest);
        if !exact {
            got.iter_mut()
                .chain(&mut expected)
                .for_each(|(_, value)| *value = without_ignore_lists(value));
        }
        self.equal(&format!("{what}: quantization_config"), &got, &expected);
    }

    /// The index of a view must list all its tensors, with the correct total size.
    fn index(&mut self, what: &str, got: &Index, tensors: &Tensors) {
        self.equal(&format!("{what}: total_size"), &got.metadata.total_size, &total_bytes(tensors));
        let named = tensors.keys().filter(|name| got.weight_map.contains_key(*name)).count();
        let counts = (named, got.weight_map.len());
        self.equal(&format!("{what}: weight_map"), &counts, &(tensors.len(), tensors.len()));
    }

    fn finish(self) {
        assert!(self.0.is_empty(), "{} failures:\n{}", self.0.len(), self.0.join("\n"));
    }
}

/// The number of elements of each dtype.
fn elements(tensors: &Tensors) -> BTreeMap<&str, u64> {
    let mut sums = BTreeMap::new();
    for (dtype, shape) in tensors.values() {
        *sums.entry(dtype.as_str()).or_default() += shape.iter().product::<u64>();
    }
    sums
}

/// Splits off `quantization_config` objects, with the key of the object that contains them. Returns
/// them and the rest.
fn split_quantization(config: &Value) -> (Vec<(String, Value)>, Value) {
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

/// Removes nulls and lists of unquantized modules.
fn without_ignore_lists(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            let kept = object
                .iter()
                .filter(|(key, value)| !value.is_null() && !IGNORE_LISTS.contains(&key.as_str()));
            kept.map(|(key, value)| (key.clone(), without_ignore_lists(value))).collect()
        }
        other => other.clone(),
    }
}

/// Peak resident memory in MiB since the last call.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    // This file exists only on Linux, and the numbers are only printed.
    let _ = fs::write("/proc/self/clear_refs", "5");
    kib.unwrap_or(0) / 1024
}

fn to(layout: LayoutName) -> PlanOptions {
    PlanOptions { to: Some(layout), ..PlanOptions::default() }
}

/// A release, and the differences that are expected after a round trip.
struct Case {
    name: &'static str,
    /// Parts of the names of tensors that the `transformers` layout drops; it has no MTP layers.
    dropped_by_transformers: &'static [&'static str],
    /// Whether the mapping can write the release's quantization without an original.
    back_by_mapping: bool,
    /// Whether the native layout casts every floating-point tensor.
    native_is_bf16: bool,
    /// Whether the mapping writes F32 scales that are not powers of two, unlike the release's, so
    /// that config.json must not state `scale_fmt`.
    loses_scale_fmt: bool,
    /// Whether the mapping writes the first scheme of the family, which is not the release's.
    other_scheme: bool,
}

const fn case(name: &'static str) -> Case {
    Case {
        name,
        dropped_by_transformers: &[],
        back_by_mapping: true,
        native_is_bf16: false,
        loses_scale_fmt: false,
        other_scheme: false,
    }
}

impl Case {
    const fn transformers_drops(self, parts: &'static [&'static str]) -> Case {
        Case { dropped_by_transformers: parts, ..self }
    }

    const fn needs_original(self) -> Case {
        Case { back_by_mapping: false, ..self }
    }

    const fn loses_scale_fmt(self) -> Case {
        Case { loses_scale_fmt: true, ..self }
    }

    const fn other_scheme(self) -> Case {
        Case { other_scheme: true, ..self }
    }

    const fn cast_in_native(self) -> Case {
        Case { native_is_bf16: true, ..self }
    }

    fn loses(&self, layout: LayoutName, name: &str) -> bool {
        match layout {
            LayoutName::Transformers => {
                self.dropped_by_transformers.iter().any(|p| name.contains(p))
            }
            LayoutName::Native | LayoutName::Hf => false,
        }
    }

    fn kept(&self, layout: LayoutName, tensors: &Tensors) -> Tensors {
        let kept = tensors.iter().filter(|(name, _)| !self.loses(layout, name));
        kept.map(|(name, tensor)| (name.clone(), tensor.clone())).collect()
    }

    /// Plans a view in every layout, saves it, and converts it back.
    fn check(&self, release: &Release, failures: &mut Failures) {
        let stored = release.tensors();
        let sparse = release.write();
        let tb = total_bytes(&stored) as f64 / 1e12;
        println!("{}: {} tensors, {tb:.3} TB", self.name, stored.len());
        let matrices = logical_tensors(&stored);
        let quantized = matrices.tensors != stored;
        for layout in LAYOUTS {
            let what = format!("{}, {layout}", self.name);
            peak();
            let shown = match show(sparse.path(), &to(layout)) {
                Ok(shown) => shown,
                Err(message) => {
                    failures.add(format!("{what}: {message}"));
                    continue;
                }
            };
            report(&layout.to_string(), &shown);
            self.check_view(&what, layout, &shown, &matrices, failures);
            failures.plain_config(&what, &shown.config, &release.config());
            if layout != LayoutName::Hf {
                let files = [("config.json".to_owned(), shown.config_text.clone())];
                let saved = Sparse::write(&shown.entries(), &files);
                drop(shown);
                let original = quantized.then_some(&sparse);
                self.check_back(layout, &saved, release, original, failures);
            }
        }
    }

    fn check_view(
        &self,
        what: &str,
        layout: LayoutName,
        shown: &PlannedView,
        matrices: &LogicalTensors,
        failures: &mut Failures,
    ) {
        let (got, mut expected) = (shown.tensors(), self.kept(layout, &matrices.tensors));
        let dropped = matrices.tensors.len() - expected.len();
        failures.equal(&format!("{what}: dropped"), &shown.dropped(), &(dropped as u64));
        let lost = matrices.tensors.keys().filter(|name| self.loses(layout, name));
        failures.equal(
            &format!("{what}: lost"),
            &shown.unserved(matrices),
            &lost.cloned().collect(),
        );
        if layout == LayoutName::Native && self.native_is_bf16 {
            let floats = expected.values_mut().filter(|(dtype, _)| dtype == "F32");
            floats.for_each(|(dtype, _)| *dtype = "BF16".to_owned());
        }
        match layout {
            LayoutName::Hf => failures.same(what, &got, &expected),
            LayoutName::Native | LayoutName::Transformers => {
                failures.equal(&format!("{what}: elements"), &elements(&got), &elements(&expected));
            }
        }
        failures.index(what, &shown.index, &got);
    }

    /// Converts a saved layout back: unquantized, or quantized as the original.
    fn check_back(
        &self,
        from: LayoutName,
        saved: &Sparse,
        release: &Release,
        original: Option<&Sparse>,
        failures: &mut Failures,
    ) {
        let expected = self.kept(from, &release.tensors());
        let quantize = |original| Some(Quantize { original, ..Quantize::default() });
        let ways = match original {
            None => vec![("plain", None)],
            Some(original) => {
                let original = Arc::new(Checkpoint::open(original.path()).unwrap());
                let by_original = ("by the original", quantize(Some(original)));
                vec![("by the mapping", quantize(None)), by_original]
            }
        };
        for (way, quantize) in ways {
            let what = format!("{}, {from} -> hf {way}", self.name);
            let by_original = quantize.as_ref().map(|q| q.original.is_some());
            peak();
            let shown = show(saved.path(), &PlanOptions { quantize, ..to(LayoutName::Hf) });
            let needs_original = by_original == Some(false) && !self.back_by_mapping;
            let shown = match shown {
                Err(message) if needs_original && message.contains("take it from the original") => {
                    continue;
                }
                Ok(_) if needs_original => {
                    failures.add(format!(
                        "{what}: expected a message that asks for the original checkpoint"
                    ));
                    continue;
                }
                Err(message) => {
                    failures.add(format!("{what}: {message}"));
                    continue;
                }
                Ok(shown) => shown,
            };
            report(&format!("{from} -> hf {way}"), &shown);
            if self.other_scheme && by_original == Some(false) {
                let method = shown.config["quantization_config"]["quant_method"].clone();
                failures.equal(&format!("{what}: quant_method"), &method, &Value::from("fp8"));
                continue;
            }
            failures.same(&what, &shown.tensors(), &expected);
            failures.index(&what, &shown.index, &expected);
            let (config, mut release) = (&shown.config, release.config());
            if self.loses_scale_fmt && by_original == Some(false) {
                let stated = release["quantization_config"].as_object_mut().unwrap();
                stated.shift_remove("scale_fmt").unwrap();
            }
            match by_original {
                None => failures.plain_config(&what, config, &release),
                Some(exact) => failures.quantized_config(&what, config, &release, exact),
            }
        }
    }
}

fn report(what: &str, shown: &PlannedView) {
    let ([plan, view], peak) = (shown.seconds, peak());
    println!("  {what}: plan {plan:.2} s, view {view:.2} s, peak {peak} MiB");
}

fn check(cases: &[Case]) {
    let mut failures = Failures::default();
    for case in cases {
        case.check(&Release::read(case.name), &mut failures);
    }
    failures.finish();
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn deepseek_v3_round_trips() {
    check(&[
        case("deepseek-v3").transformers_drops(&["model.layers.61."]),
        case("deepseek-v3-bf16-cast").transformers_drops(&["model.layers.61."]),
    ]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn deepseek_v3_1_round_trips() {
    check(&[case("deepseek-v3.1").loses_scale_fmt().transformers_drops(&["model.layers.61."])]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn kimi_k2_round_trips() {
    check(&[case("kimi-k2-instruct").transformers_drops(&["rotary_emb.inv_freq"])]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn deepseek_v4_flash_round_trips() {
    check(&[case("deepseek-v4-flash").transformers_drops(&["mtp."])]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn deepseek_v4_pro_round_trips() {
    check(&[case("deepseek-v4-pro").transformers_drops(&["mtp."])]);
}

/// Without `expert_dtype` in config.json, the experts are FP4.
#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn deepseek_v4_pro_without_expert_dtype_round_trips() {
    check(&[case("deepseek-v4-pro-no-expert-dtype").transformers_drops(&["mtp."])]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn deepseek_v4_flash_0731_round_trips() {
    check(&[
        case("deepseek-v4-flash-0731").transformers_drops(&["mtp."]),
        case("deepseek-v4-flash-0731-reap160").transformers_drops(&["mtp."]),
    ]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn deepseek_v4_base_round_trips() {
    check(&[case("deepseek-v4-flash-base").loses_scale_fmt().transformers_drops(&["mtp."])]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn glm_4_5_round_trips() {
    check(&[
        case("glm-4.5").transformers_drops(&["model.layers.92."]),
        case("glm-4.5-air").transformers_drops(&["model.layers.46."]),
        // Pruned to 96 experts with transformers, which dropped the MTP layer.
        case("glm-4.5-air-reap96"),
    ]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn glm_4_5_fp8_round_trips_with_its_original() {
    check(&[
        case("glm-4.5-fp8").transformers_drops(&["model.layers.92."]).needs_original(),
        case("glm-4.5-air-fp8").transformers_drops(&["model.layers.46."]).needs_original(),
    ]);
}

/// The MTP layer of GLM-4.6 and others shares the embedding and the head of the model.
#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn an_mtp_layer_without_embedding_and_head_round_trips() {
    let mut release = Release::read("glm-4.5");
    let shared = ["model.layers.92.embed_tokens.weight", "model.layers.92.shared_head.head.weight"];
    let before = release.entries.len();
    release.entries.retain(|(name, ..)| !shared.contains(&name.as_str()));
    assert_eq!(release.entries.len(), before - 2);
    let mut failures = Failures::default();
    case("glm-4.5").transformers_drops(&["model.layers.92."]).check(&release, &mut failures);
    failures.finish();
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn gpt_oss_round_trips() {
    check(&[case("gpt-oss-20b"), case("gpt-oss-20b-bf16"), case("gpt-oss-120b")]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn kimi_k2_5_round_trips() {
    check(&[case("kimi-k2.5").cast_in_native()]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn kimi_k2_6_round_trips() {
    check(&[case("kimi-k2.6").cast_in_native()]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn kimi_k2_thinking_round_trips() {
    check(&[case("kimi-k2-thinking").other_scheme()]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn mimo_v2_flash_round_trips() {
    check(&[case("mimo-v2-flash").transformers_drops(&["model.mtp."])]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn minimax_m2_round_trips() {
    check(&[case("minimax-m2.7")]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn qwen3_moe_round_trips() {
    check(&[case("qwen3-235b-a22b"), case("qwen3-30b-a3b"), case("qwen3-30b-a3b-v5config")]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn qwen3_moe_fp8_round_trips() {
    check(&[
        case("qwen3-235b-a22b-fp8"),
        case("qwen3-235b-a22b-2507-fp8"),
        case("qwen3-30b-a3b-fp8"),
    ]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn qwen3_vl_moe_round_trips() {
    check(&[case("qwen3-vl-30b-a3b"), case("qwen3-vl-30b-a3b-fp8"), case("qwen3-vl-235b-a22b")]);
}

/// Releases whose quantization is not supported, and a suffix of the tensors that the message must
/// name.
const REFUSED: [(&str, &str); 11] = [
    ("deepseek-v3.1-nvfp4", "weight_scale_2"),
    ("deepseek-v4-flash-nvfp4", "weight_scale_2"),
    ("kimi-k2.5-nvfp4", "weight_scale_2"),
    ("kimi-k2.6-nvfp4", "weight_scale_2"),
    ("minimax-m2.5-nvfp4", "weight_scale_2"),
    ("qwen3-235b-a22b-nvfp4", "weight_scale_2"),
    ("qwen3-30b-a3b-autoround-w4a16", "qzeros"),
    ("qwen3-30b-a3b-awq", "qzeros"),
    ("qwen3-30b-a3b-ct-nvfp4a16", "weight_global_scale"),
    ("qwen3-30b-a3b-ct-w4a16-asym", "weight_zero_point"),
    ("qwen3-30b-a3b-gptq-int4", "qzeros"),
];

#[test]
#[cfg_attr(debug_assertions, ignore = "true sizes: cargo test --release --test releases")]
fn unsupported_quantizations_are_refused_with_their_tensors() {
    let mut failures = Failures::default();
    for (name, part) in REFUSED {
        let sparse = Release::read(name).write();
        let ways = LAYOUTS.map(|layout| (layout, Unmapped::Refuse));
        let kept = [Unmapped::Keep, Unmapped::Drop].map(|unmapped| (LayoutName::Native, unmapped));
        for (layout, unmapped) in ways.into_iter().chain(kept) {
            let what = format!("{name}, {layout}, unmapped: {unmapped:?}");
            let options = PlanOptions { unmapped, ..to(layout) };
            match plan(sparse.path(), &options) {
                Ok(_) => failures.add(format!("{what}: expected a refusal")),
                Err(message) => {
                    let heading = "parts of a quantization that is not supported: ";
                    let named = message.split(heading).nth(1).unwrap_or_default();
                    let named = named.split("; ").next().unwrap_or_default();
                    if !named.contains(part) {
                        failures.add(format!("{what}: `{part}` is not named: {message}"));
                    }
                }
            }
        }
    }
    failures.finish();
}
