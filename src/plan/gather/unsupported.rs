//! What belongs to a quantization and cannot be honoured: refused, whatever the options say.
//!
//! A zero point or an order of columns beside a payload changes every number of it. Such a tensor
//! is no stranger that a user may drop, and what config.json says of bits, symmetry and order is
//! held against what the decoder does.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::matrices::MatrixGatherer;
use super::orphans::PayloadRef;
use crate::codec::Scheme;
use crate::plan::Matrix;
use crate::plan::report::{Problem, Problems};
use crate::source::{Config, SourceId};

/// Ends of names beside a quantized weight that do not change its numbers: biases, and scales of
/// activations and of the KV cache.
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

/// Ends of names that belong to quantizations without a decoder here: GPTQ and AWQ, ModelOpt and
/// compressed-tensors' NVFP4, asymmetric and reordered INT4, Ascend's INT8, bitsandbytes, MLX.
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
    /// Refuses matrices of quantizations without a decoder, before an encoding takes parts of them.
    pub(super) fn refuse_unsupported_schemes(&mut self) {
        let claimed =
            |name: &str| self.mapping.encodings.iter().any(|e| PayloadRef::of(e, name).is_some());
        let unsupported = |name: &str| matrix_of_unsupported(name).filter(|_| !claimed(name));
        let refused = self.refuse_parts(unsupported);
        if refused.is_empty() {
            return;
        }
        // What else stands beside them is no news, nor a part of anything.
        for id in (0..).map(SourceId).take(self.checkpoint.tensors().len()) {
            let name = &self.tensor(id).name;
            let beside = possible_matrices(name).any(|module| refused.contains(&module));
            if beside && !self.mapping.layouts().any(|layout| layout.names_exactly(name)) {
                self.used[id.index()] = true;
            }
        }
    }

    /// Refuses what stands beside a quantized matrix and is not among its parts: its numbers would be
    /// wrong without.
    pub(super) fn refuse_unsupported_companions(&mut self) {
        let quantized = self.quantized_names();
        if quantized.is_empty() {
            return;
        }
        self.refuse_parts(|name: &str| {
            let module = possible_matrices(name).find(|module| quantized.contains(module))?;
            let end = name.strip_prefix(module.trim_end_matches("weight")).unwrap_or(name);
            (module != name && !HARMLESS_SUFFIXES.contains(&end.trim_start_matches('_')))
                .then_some(module)
        });
    }

    /// Refuses the tensors that `matrix_of` takes for parts of a matrix; gives these matrices.
    ///
    /// A rule that takes names by their ends, `self_attn.{r}`, is no rule for such a tensor.
    fn refuse_parts(&mut self, matrix_of: impl Fn(&str) -> Option<String>) -> HashSet<String> {
        let all = (0..).map(SourceId).take(self.checkpoint.tensors().len());
        let part = |id: SourceId| {
            let name = &self.tensor(id).name;
            let matrix =
                Some(name).filter(|_| !self.used[id.index()]).and_then(|n| matrix_of(n))?;
            let written_out = self.mapping.layouts().any(|layout| layout.names_exactly(name));
            (!written_out).then_some((id, matrix))
        };
        let found: Vec<(SourceId, String)> = all.filter_map(part).collect();
        for (id, matrix) in &found {
            let what = format!("of `{matrix}`");
            self.problems.explain(Problem::Unsupported, &self.tensor(*id).name, what);
            self.refuse(matrix, [Some(*id), self.checkpoint.find(matrix)]);
        }
        found.into_iter().map(|(_, matrix)| matrix).collect()
    }
}

/// The matrices that a tensor may stand beside, by its name: `x.weight` for `x.scale`, and `x` for
/// `x_scale`, the matrix of stacked experts.
fn possible_matrices(name: &str) -> impl Iterator<Item = String> {
    let weight = name.rsplit_once('.').map(|(module, _)| format!("{module}.weight"));
    let last = name.rfind('.').map_or(0, |i| i + 1);
    let starts = name.match_indices('_').filter(move |(i, _)| *i > last);
    weight.into_iter().chain(starts.map(|(i, _)| name[..i].to_owned()))
}

/// The matrix that a tensor is a part of, where its name ends as no other does: `x.weight` for
/// `x.qweight`, `x` for `x_weight_scale_2`.
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

/// Notes what config.json states of a quantization that these matrices are not, or that is not
/// supported.
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
        // RuleGroups of floats are other matrices.
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

/// A key, what it has to be in words, and whether a value is that.
type ConfigCheck = (&'static str, &'static str, fn(&Value) -> bool);

/// What `config_groups.*.weights` says of packed INT4 (compressed-tensors `QuantizationArgs`).
/// `actorder` `static` and `weight` only order the quantizer's work, `group` stores `weight_g_idx`.
const INT4_WEIGHTS: [ConfigCheck; 4] = [
    ("num_bits", "4", |v| v.is_null() || *v == 4),
    ("type", "`int`", |v| v.is_null() || *v == "int"),
    ("symmetric", "true", |v| v.is_null() || *v == true),
    ("actorder", "null, `static` or `weight`", |v| {
        v.is_null() || *v == false || *v == "static" || *v == "weight"
    }),
];

/// The same as other tools spell it, at the top of `quantization_config`.
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
