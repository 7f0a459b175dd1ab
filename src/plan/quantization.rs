//! What becomes of `quantization_config`.

use super::assemble::Target;
use super::matrix::Matrix;
use super::options::PlanOptions;
use super::problems::PlanError;
use super::{Quantization, Quantized};
use crate::mapping::{LayoutName, QuantizationConfig, Resolved};
use crate::source::{Checkpoint, Config};

/// What becomes of `quantization_config`.
pub fn quantization(
    checkpoint: &Checkpoint,
    mapping: &Resolved,
    options: &PlanOptions,
    from: LayoutName,
    matrices: &[Matrix],
    targets: &[Target],
    quantized: &[Quantized],
) -> Result<Quantization, PlanError> {
    if quantized.is_empty() {
        // A grouped layout is never quantized: its config.json may be the published one all the same.
        let was = from != LayoutName::Hf || matrices.iter().any(|m| m.scales.is_some());
        return Ok(if was { Quantization::Remove } else { Quantization::Keep });
    }
    let original = options.quantize.as_ref().and_then(|q| q.original.as_deref());
    if let Some(config) = original.and_then(|o| quantization_of(o.config())) {
        return Ok(Quantization::Replace(config));
    }
    if quantization_of(checkpoint.config()).is_some() {
        return Ok(Quantization::Keep);
    }
    let Some(mut config) = mapping.quantization.clone() else {
        return Err(PlanError::Option(format!(
            "the mapping `{}` does not say what `quantization_config` is; take it from a \
             checkpoint with --scales-from",
            mapping.name
        )));
    };
    if let (Some(key), Some(value)) = (&config.unquantized, config.value.as_object_mut()) {
        value.insert(key.clone(), unquantized_modules(targets).into());
    }
    Ok(Quantization::Replace(config))
}

/// Modules whose weight matrices are not quantized.
fn unquantized_modules(targets: &[Target]) -> Vec<String> {
    let matrices = targets.iter().filter(|t| t.shape.len() == 2);
    matrices.filter_map(|t| t.name.strip_suffix(".weight")).map(str::to_owned).collect()
}

/// `quantization_config` of a checkpoint, and where it stands.
fn quantization_of(config: &Config) -> Option<QuantizationConfig> {
    const KEY: &str = "quantization_config";
    if let Some(value) = config.top().get(KEY) {
        return Some(QuantizationConfig { within: None, unquantized: None, value: value.clone() });
    }
    config.top().iter().find_map(|(name, object)| {
        let value = object.as_object()?.get(KEY)?.clone();
        Some(QuantizationConfig { within: Some(name.clone()), unquantized: None, value })
    })
}
