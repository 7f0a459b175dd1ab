//! What belongs to a quantization and cannot be honoured: refused, whatever the options say.
//!
//! A zero point or an order of columns beside a payload changes every number of it. Such a tensor
//! is no stranger that a user may drop, and what config.json says of bits, symmetry and order is
//! held against what the decoder does.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::matrix::Matrix;
use super::problems::{Problem, Problems};
use super::sources::Grouping;
use crate::codec::Scheme;
use crate::source::{Config, SourceId};

/// Ends of names beside a quantized weight that do not change its numbers: biases, and scales of
/// activations and of the KV cache.
const APART: [&str; 9] = [
    "bias",
    "input_scale",
    "input_global_scale",
    "activation_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "prob_scale",
];

/// Ends of names that belong to quantizations without a decoder here: GPTQ and AWQ, ModelOpt and
/// compressed-tensors' NVFP4, asymmetric and reordered INT4, Ascend's INT8, bitsandbytes, MLX.
const PARTS: [&str; 18] = [
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

impl Grouping<'_> {
    /// Refuses tensors without which a matrix cannot be decoded, or its numbers would be wrong.
    ///
    /// A rule that takes names by their ends, `self_attn.{r}`, is no rule for such a tensor.
    pub(super) fn companions(&mut self) {
        let quantized: HashSet<String> = self.quantized_names();
        let mut refused = HashSet::new();
        let unused = |g: &Self, id: SourceId| !g.used[id.index()];
        let all = || (0..).map(SourceId).take(self.checkpoint.tensors().len());
        let found: Vec<(SourceId, String)> = all()
            .filter(|id| unused(self, *id))
            .filter_map(|id| Some((id, matrix_of(&self.tensor(id).name, &quantized)?)))
            .filter(|(id, _)| {
                let name = &self.tensor(*id).name;
                !self.mapping.layouts().any(|layout| layout.writes_out(name))
            })
            .collect();
        for (id, matrix) in found {
            let what = format!("of `{matrix}`");
            self.problems.explain(Problem::Unsupported, &self.tensor(id).name, what);
            self.refuse(&matrix, [Some(id), self.checkpoint.find(&matrix)]);
            refused.insert(matrix);
        }
        if refused.is_empty() {
            return;
        }
        // Scales of activations beside them are no news.
        let apart: Vec<SourceId> = (0..)
            .map(SourceId)
            .take(self.checkpoint.tensors().len())
            .filter(|id| {
                let split = self.tensor(*id).name.rsplit_once('.');
                split.is_some_and(|(module, end)| {
                    APART.contains(&end) && refused.contains(&format!("{module}.weight"))
                })
            })
            .collect();
        for id in apart {
            self.used[id.index()] = true;
        }
    }
}

/// The matrix whose numbers a tensor is about: `x.weight` for `x.qweight` and, where it is
/// quantized, for whatever else stands beside it; `x` for `x_zero_point`.
fn matrix_of(name: &str, quantized: &HashSet<String>) -> Option<String> {
    let (module, end) = name.rsplit_once('.')?;
    if APART.contains(&end) {
        return None;
    }
    let module = module.strip_suffix(".quant_state").unwrap_or(module);
    let module = module.strip_suffix(".weight").unwrap_or(module);
    let weight = format!("{module}.weight");
    if weight != name && (PARTS.contains(&end) || quantized.contains(&weight)) {
        return Some(weight);
    }
    if let Some(matrix) = PARTS.iter().find_map(|part| name.strip_suffix(part)?.strip_suffix('_')) {
        return Some(matrix.to_owned());
    }
    if quantized.is_empty() {
        return None;
    }
    let mut starts = name.match_indices('_').map(|(i, _)| (&name[..i], &name[i + 1..]));
    let (matrix, _) =
        starts.find(|(start, end)| quantized.contains(*start) && !APART.contains(end))?;
    Some(matrix.to_owned())
}

/// Notes what config.json states of a quantization that these matrices are not, or that is not
/// supported.
pub fn check_config(config: &Config, matrices: &[Matrix], problems: &mut Problems) {
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
    let stated = config.get(KEY).and_then(Value::as_object);
    if let Some(format) = stated.and_then(|s| s.get("format")).filter(|f| !format_fits(f)) {
        refuse(format!("{KEY}.format"), "`pack-quantized`", format);
    }
    let groups = stated.and_then(|s| s.get("config_groups")).and_then(Value::as_object);
    for (name, group) in groups.into_iter().flatten() {
        let Some(weights) = group.get("weights").and_then(Value::as_object) else { continue };
        // Groups of floats are other matrices.
        if weights.get("type").is_some_and(|t| *t == "float") {
            continue;
        }
        let key = |k: &str| format!("{KEY}.config_groups.{name}.weights.{k}");
        for (k, expected, fits) in WEIGHTS {
            let found = weights.get(k).unwrap_or(&Value::Null);
            if !fits(found) {
                refuse(key(k), expected, found);
            }
        }
        if let Some(format) = group.get("format").filter(|f| !format_fits(f)) {
            refuse(format!("{KEY}.config_groups.{name}.format"), "`pack-quantized`", format);
        }
    }
    older_keys(stated, &mut refuse);
}

/// A key, what it has to be in words, and whether a value is that.
type Key = (&'static str, &'static str, fn(&Value) -> bool);

/// What `config_groups.*.weights` says of packed INT4 (compressed-tensors `QuantizationArgs`).
/// `actorder` `static` and `weight` only order the quantizer's work, `group` stores `weight_g_idx`.
const WEIGHTS: [Key; 4] = [
    ("num_bits", "4", |v| v.is_null() || *v == 4),
    ("type", "`int`", |v| v.is_null() || *v == "int"),
    ("symmetric", "true", |v| v.is_null() || *v == true),
    ("actorder", "null, `static` or `weight`", |v| {
        v.is_null() || *v == false || *v == "static" || *v == "weight"
    }),
];

/// The same as other tools spell it, at the top of `quantization_config`.
fn older_keys(stated: Option<&Map<String, Value>>, refuse: &mut impl FnMut(String, &str, &Value)) {
    const KEYS: [Key; 4] = [
        ("bits", "4", |v| *v == 4),
        ("sym", "true", |v| *v == true),
        ("zero_point", "false", |v| *v == false),
        ("desc_act", "false", |v| *v == false),
    ];
    for (key, expected, fits) in KEYS {
        if let Some(found) = stated.and_then(|s| s.get(key)).filter(|v| !v.is_null() && !fits(v)) {
            refuse(format!("quantization_config.{key}"), expected, found);
        }
    }
}
