//! What the view's config.json must say about the view's tensors: `quantization_config` and dtype.
//!
//! Both are derived from the tensors of the view. Where quantized tensors, or their scales, are
//! copied from a checkpoint, its `quantization_config` is copied too. Otherwise config.json of the
//! source is not trusted: it may be the published one next to plain weights, or give another block
//! size.

use serde_json::Value;

use crate::codec::{ScaleCode, Scheme};
use crate::mapping::{QuantizationConfig, ResolvedMapping};
use crate::plan::arrange::ViewTensor;
use crate::plan::report::PlanError;
use crate::plan::{Body, ConfigEntries, EncodedMatrix, Origin, TensorPlan};
use crate::source::{Checkpoint, Config};
use crate::tensor::Float;

/// The entries of config.json for a view of these tensors.
///
/// `is_quantized` says whether one of them is part of a quantized matrix. `like` is the checkpoint
/// that quantized tensors or scales are copied from; without one, the entries describe `quantized`.
///
/// # Errors
/// Neither `like` nor the mapping has a `quantization_config`.
pub(in crate::plan) fn config_entries(
    is_quantized: bool,
    like: Option<&Checkpoint>,
    mapping: &ResolvedMapping,
    view_tensors: &[ViewTensor],
    tensors: &[TensorPlan],
    quantized: &[EncodedMatrix],
) -> Result<ConfigEntries, PlanError> {
    let dtype = dominant_dtype(tensors);
    if !is_quantized {
        return Ok(ConfigEntries { quantization: None, dtype });
    }
    if let Some(config) = like.and_then(|like| quantization_of(like.config())) {
        return Ok(ConfigEntries { quantization: Some(config), dtype });
    }
    let fits = |c: &&QuantizationConfig| {
        c.scheme.is_none_or(|scheme| quantized.iter().any(|q| q.scheme == scheme))
    };
    let Some(mut config) = mapping.quantization.iter().find(fits).cloned() else {
        let lacks = "what `quantization_config` is";
        return Err(PlanError::UnknownQuantization { mapping: mapping.name.clone(), lacks });
    };
    complete(&mut config, view_tensors, quantized);
    Ok(ConfigEntries { quantization: Some(config), dtype })
}

/// Completes the mapping's `quantization_config` with what was written: block and group sizes, the
/// rounding of scales, and the modules that are not quantized.
fn complete(
    config: &mut QuantizationConfig,
    view_tensors: &[ViewTensor],
    quantized: &[EncodedMatrix],
) {
    let unquantized = config.unquantized.clone();
    let Some(value) = config.value.as_object_mut() else { return };
    let mut fp8 = quantized.iter().filter(|q| q.scheme == Scheme::Fp8);
    if !fp8.clone().all(|q| q.scale == ScaleCode::E8M0) {
        // It stands for scales that are powers of two.
        value.shift_remove("scale_fmt");
    }
    if let (Some(block), Some(q)) = (value.get_mut("weight_block_size"), fp8.next()) {
        *block = q.block.to_vec().into();
    }
    let int4 = quantized.iter().find(|q| q.scheme == Scheme::Int4);
    let groups = value.get_mut("config_groups").and_then(Value::as_object_mut);
    for (_, group) in groups.into_iter().flatten() {
        if let (Some(size), Some(q)) = (group.pointer_mut("/weights/group_size"), int4) {
            *size = q.block[1].into();
        }
    }
    if let Some(key) = unquantized {
        value.insert(key, unquantized_modules(view_tensors).into());
    }
}

/// Modules whose weight matrices are not quantized.
fn unquantized_modules(view_tensors: &[ViewTensor]) -> Vec<String> {
    let matrices = view_tensors.iter().filter(|t| t.shape.len() == 2);
    matrices.filter_map(|t| t.name.strip_suffix(".weight")).map(str::to_owned).collect()
}

/// The dtype that most elements of the plain floating-point tensors have.
fn dominant_dtype(tensors: &[TensorPlan]) -> Option<Float> {
    let mut elements = [(Float::BF16, 0u128), (Float::F16, 0), (Float::F32, 0)];
    for tensor in tensors {
        let plain = match &tensor.body {
            Body::Verbatim(runs) => runs.iter().all(|r| r.origin == Origin::Source),
            Body::Computed(_) => true,
            Body::Encoded(_) | Body::Literal(_) => false,
        };
        let Some(float) = tensor.dtype.as_float().filter(|_| plain) else { continue };
        let slot = elements.iter_mut().find(|(f, _)| *f == float).expect("all floats are listed");
        slot.1 += u128::from(tensor.shape.elements().unwrap_or(0));
    }
    // Reversed, so that the first of equals is taken.
    let most = elements.iter().rev().max_by_key(|(_, n)| *n)?;
    (most.1 > 0).then_some(most.0)
}

/// `quantization_config` of a checkpoint, and the object that contains it.
fn quantization_of(config: &Config) -> Option<QuantizationConfig> {
    const KEY: &str = "quantization_config";
    let found = |within: Option<&String>, value: &Value| QuantizationConfig {
        within: within.cloned(),
        unquantized: None,
        scheme: None,
        value: value.clone(),
    };
    if let Some(value) = config.top().get(KEY).filter(|v| !v.is_null()) {
        return Some(found(None, value));
    }
    config.top().iter().find_map(|(name, object)| {
        let value = object.as_object()?.get(KEY).filter(|v| !v.is_null())?;
        Some(found(Some(name), value))
    })
}
