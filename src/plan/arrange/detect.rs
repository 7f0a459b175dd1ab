//! Which layout a checkpoint is in, by its names and, where those do not tell, its shapes.

use crate::mapping::{Layout, LayoutName, ResolvedMapping, RuleMatch};
use crate::plan::Matrix;
use crate::plan::gather::WholeTensor;
use crate::plan::report::PlanError;
use crate::source::Checkpoint;

/// Which layout the source is in: the one whose renaming and grouping rules know most of its names,
/// and more of them as the layout's than as the checkpoint's; `hf` where there is none.
pub(in crate::plan) fn source_layout(
    wholes: &[WholeTensor<'_>],
    matrices: &[Matrix],
    checkpoint: &Checkpoint,
    mapping: &ResolvedMapping,
) -> Result<LayoutName, PlanError> {
    // A rule speaks for a side where the names of its sides differ, or where it has operations and
    // the tensor's shape is one of that side.
    let count =
        |speaks: &dyn Fn(&WholeTensor<'_>) -> bool| wholes.iter().filter(|w| speaks(w)).count();
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
    let named = wholes.iter().any(|w| {
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
