//! Detects the layout of the source by its names and, where names are equal, by its shapes.

use crate::mapping::{Layout, LayoutName, ResolvedMapping, RuleMatch};
use crate::plan::Matrix;
use crate::plan::gather::WholeTensor;
use crate::plan::report::PlanError;
use crate::source::Checkpoint;

/// The layout of the source. For each layout, tensors are counted that a rule matches on the
/// layout's side and on the published side. The layout with the most matches on its own side wins,
/// if those are more than its matches on the published side; otherwise the source is `hf`.
///
/// # Errors
/// Nothing shows that the checkpoint fits the mapping: no layout wins, no tensor is quantized, and
/// no rule names any tensor.
pub(in crate::plan) fn source_layout(
    whole_tensors: &[WholeTensor<'_>],
    matrices: &[Matrix],
    checkpoint: &Checkpoint,
    mapping: &ResolvedMapping,
) -> Result<LayoutName, PlanError> {
    // A tensor is evidence for a side if the rule renames it or, where the names are equal on both
    // sides, if the rule has operations and the tensor's shape fits that side.
    let count = |speaks: &dyn Fn(&WholeTensor<'_>) -> bool| {
        whole_tensors.iter().filter(|w| speaks(w)).count()
    };
    let as_hf = |layout: &Layout, w: &WholeTensor<'_>| {
        let canonical = mapping.canonical(w.name);
        match layout.match_hf(canonical.as_deref().unwrap_or(w.name)) {
            Some(RuleMatch::Map { rule, .. }) => {
                let fits = !rule.keeps_names() || rule.fits_part(&w.shape);
                !rule.is_identity() && fits
            }
            Some(RuleMatch::Drop { .. }) | None => false,
        }
    };
    let as_layout = |layout: &Layout, w: &WholeTensor<'_>| match layout.match_to(w.name) {
        Some(RuleMatch::Map { rule, .. }) => {
            let fits = !rule.keeps_names() || rule.fits_layout(&w.shape);
            !rule.is_identity() && fits
        }
        Some(RuleMatch::Drop { .. }) | None => false,
    };
    let mut best = (LayoutName::Hf, 0);
    for layout in mapping.layouts() {
        let (hf, n) = (count(&|w| as_hf(layout, w)), count(&|w| as_layout(layout, w)));
        if n > hf.max(best.1) {
            best = (layout.name, n);
        }
    }
    let quantized = matrices.iter().any(|m| m.scales.is_some());
    let named = whole_tensors.iter().any(|w| {
        let canonical = mapping.canonical(w.name);
        let name = canonical.as_deref().unwrap_or(w.name);
        mapping.layouts().any(|l| l.match_hf(name).is_some())
    });
    if best.0 == LayoutName::Hf && !quantized && !named {
        return Err(PlanError::UnknownLayout {
            model: mapping.name.clone(),
            tensors: checkpoint.tensors().len(),
        });
    }
    Ok(best.0)
}
