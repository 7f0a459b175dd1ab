//! Refuses quantizations that no decoder here supports, whatever the options say.
//!
//! A zero point or a column order stored with a payload changes every element of the matrix. So the
//! user cannot drop such a tensor like an unmapped one. The bits, symmetry and order that
//! config.json gives are compared with what the decoder does.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::matrices::MatrixGatherer;
use super::orphans::PayloadRef;
use crate::codec::Scheme;
use crate::plan::Matrix;
use crate::plan::report::{Problem, Problems};
use crate::source::{Config, SourceId};

/// Endings of tensors that occur with a quantized weight and do not change its elements: biases,
/// and scales of activations and of the KV cache.
const HARMLESS_SUFFIXES: [&str; 11] = [
    "bias",
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "input_amax",
    "activation_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "prob_scale",
];

/// Endings of tensors of quantizations without a decoder here: GPTQ and AWQ, NVFP4 of ModelOpt and
/// compressed-tensors, asymmetric and reordered INT4, Ascend's INT8, bitsandbytes, MLX.
const UNSUPPORTED_SUFFIXES: [&str; 18] = [
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_offset",
    "deq_scale",
    "quant_bias",
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "SCB",
    "bitsandbytes__nf4",
    "biases",
];

impl MatrixGatherer<'_> {
    /// Refuses matrices of unsupported quantizations, before an encoding could take some of their
    /// tensors.
    pub(super) fn refuse_unsupported_schemes(&mut self) {
        let claimed =
            |name: &str| self.mapping.encodings.iter().any(|e| PayloadRef::of(e, name).is_some());
        let unsupported = |name: &str| matrix_of_unsupported(name).filter(|_| !claimed(name));
        let refused = self.refuse_parts(unsupported);
        if refused.is_empty() {
            return;
        }
        // The other tensors of these matrices need no message of their own.
        for id in self.ids() {
            let name = &self.tensor(id).name;
            let belongs = possible_matrices(name).any(|matrix| refused.contains(&matrix));
            if belongs && !self.mapping.layouts().any(|layout| layout.names_exactly(name)) {
                self.used[id.index()] = true;
            }
        }
    }

    /// Refuses tensors that belong to a quantized matrix by their name but are not part of its
    /// encoding: decoding without them could give wrong elements.
    pub(super) fn refuse_unsupported_companions(&mut self) {
        let quantized = self.quantized_names();
        if quantized.is_empty() {
            return;
        }
        self.refuse_parts(|name: &str| {
            let matrix = possible_matrices(name).find(|matrix| quantized.contains(matrix))?;
            let end = name.strip_prefix(matrix.trim_end_matches("weight")).unwrap_or(name);
            (matrix != name && !HARMLESS_SUFFIXES.contains(&end.trim_start_matches('_')))
                .then_some(matrix)
        });
    }

    /// Refuses every tensor for which `matrix_of` gives a matrix; returns the matrices.
    ///
    /// A tensor is spared only if a rule names it without `{r}`: a rule such as `self_attn.{r}`
    /// says nothing about it.
    fn refuse_parts(&mut self, matrix_of: impl Fn(&str) -> Option<String>) -> HashSet<String> {
        let part = |id: SourceId| {
            let name = &self.tensor(id).name;
            let matrix =
                Some(name).filter(|_| !self.used[id.index()]).and_then(|n| matrix_of(n))?;
            let is_named = self.mapping.layouts().any(|layout| layout.names_exactly(name));
            (!is_named).then_some((id, matrix))
        };
        let found: Vec<(SourceId, String)> = self.ids().filter_map(part).collect();
        for (id, matrix) in &found {
            let what = format!("of `{matrix}`");
            self.problems.explain(Problem::Unsupported, &self.tensor(*id).name, what);
            self.refuse(matrix, [Some(*id), self.checkpoint.find(matrix)]);
        }
        found.into_iter().map(|(_, matrix)| matrix).collect()
    }
}

/// The names of matrices that a tensor may belong to: `x.weight` for `x.scale`, and `x` for
/// `x_scale` (stacked experts).
fn possible_matrices(name: &str) -> impl Iterator<Item = String> {
    let weight = name.rsplit_once('.').map(|(module, _)| format!("{module}.weight"));
    let last = name.rfind('.').map_or(0, |i| i + 1);
    let starts = name.match_indices('_').filter(move |(i, _)| *i > last);
    weight.into_iter().chain(starts.map(|(i, _)| name[..i].to_owned()))
}

/// The matrix of a tensor with one of the [`UNSUPPORTED_SUFFIXES`]: `x.weight` for `x.qweight`, `x`
/// for `x_weight_scale_2`.
fn matrix_of_unsupported(name: &str) -> Option<String> {
    let (module, end) = name.rsplit_once('.')?;
    if UNSUPPORTED_SUFFIXES.contains(&end) {
        let module = module.strip_suffix(".quant_state").unwrap_or(module);
        let module = module.strip_suffix(".weight").unwrap_or(module);
        return Some(format!("{module}.weight"));
    }
    let of_stacked = |part: &&str| Some(name.strip_suffix(*part)?.strip_suffix('_')?.to_owned());
    UNSUPPORTED_SUFFIXES.iter().filter(|part| part.starts_with("weight_")).find_map(of_stacked)
}

/// Compares what config.json says about INT4 with what the decoder does; notes the differences.
pub(in crate::plan) fn check_config(config: &Config, matrices: &[Matrix], problems: &mut Problems) {
    const KEY: &str = "quantization_config";
    let is_int4 = |m: &&Matrix| m.scales.as_ref().is_some_and(|s| s.scheme == Scheme::Int4);
    let Some(matrix) = matrices.iter().find(is_int4) else { return };
    let mut refuse = |key: String, expected: &str, got: &Value| {
        let what = format!("config.json, for `{}`: expected {expected}, got `{got}`", matrix.name);
        problems.explain(Problem::Unsupported, &key, what);
    };
    let format_fits = |format: &Value| {
        format.is_null() || *format == "pack-quantized" || *format == "mixed-precision"
    };
    let quantization = config.get(KEY).and_then(Value::as_object);
    if let Some(format) = quantization.and_then(|s| s.get("format")).filter(|f| !format_fits(f)) {
        refuse(format!("{KEY}.format"), "`pack-quantized`", format);
    }
    let groups = quantization.and_then(|s| s.get("config_groups")).and_then(Value::as_object);
    for (name, group) in groups.into_iter().flatten() {
        let Some(weights) = group.get("weights").and_then(Value::as_object) else { continue };
        // Groups of floats are about other matrices.
        if weights.get("type").is_some_and(|t| *t == "float") {
            continue;
        }
        let key = |k: &str| format!("{KEY}.config_groups.{name}.weights.{k}");
        for (k, expected, fits) in INT4_WEIGHTS {
            let found = weights.get(k).unwrap_or(&Value::Null);
            if !fits(found) {
                refuse(key(k), expected, found);
            }
        }
        if let Some(format) = group.get("format").filter(|f| !format_fits(f)) {
            refuse(format!("{KEY}.config_groups.{name}.format"), "`pack-quantized`", format);
        }
    }
    check_older_keys(quantization, &mut refuse);
}

/// A key, the expected value as text, and whether a value is as expected.
type ConfigCheck = (&'static str, &'static str, fn(&Value) -> bool);

/// Keys of `config_groups.*.weights` for packed INT4 (`QuantizationArgs` of compressed-tensors).
/// `actorder` `static` and `weight` only change the order in which the quantizer works; `group`
/// stores a `weight_g_idx`.
const INT4_WEIGHTS: [ConfigCheck; 4] = [
    ("num_bits", "4", |v| v.is_null() || *v == 4),
    ("type", "`int`", |v| v.is_null() || *v == "int"),
    ("symmetric", "true", |v| v.is_null() || *v == true),
    ("actorder", "null, `static` or `weight`", |v| {
        v.is_null() || *v == false || *v == "static" || *v == "weight"
    }),
];

/// The same for the keys of other tools, at the top of `quantization_config`.
fn check_older_keys(
    quantization: Option<&Map<String, Value>>,
    refuse: &mut impl FnMut(String, &str, &Value),
) {
    const KEYS: [ConfigCheck; 4] = [
        ("bits", "4", |v| *v == 4),
        ("sym", "true", |v| *v == true),
        ("zero_point", "false", |v| *v == false),
        ("desc_act", "false", |v| *v == false),
    ];
    for (key, expected, fits) in KEYS {
        if let Some(found) =
            quantization.and_then(|s| s.get(key)).filter(|v| !v.is_null() && !fits(v))
        {
            refuse(format!("quantization_config.{key}"), expected, found);
        }
    }
}
