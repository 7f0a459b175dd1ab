//! Which layout a checkpoint is in, by its names and, where those do not tell, its shapes.

use super::matrix::Matrix;
use super::problems::PlanError;
use crate::mapping::{Layout, LayoutName, Resolved, Taken};
use crate::source::Checkpoint;

/// Which layout the source is in: the one whose renaming and grouping rules know most of its names,
/// and more of them as the layout's than as the checkpoint's; `hf` where there is none.
pub fn source_layout(
    matrices: &[Matrix],
    checkpoint: &Checkpoint,
    mapping: &Resolved,
) -> Result<LayoutName, PlanError> {
    // A rule speaks for a side where the names of its sides differ, or where it has operations and
    // the tensor's shape is one of that side.
    let count = |speaks: &dyn Fn(&Matrix) -> bool| matrices.iter().filter(|m| speaks(m)).count();
    let as_hf = |layout: &Layout, m: &Matrix| {
        let canonical = mapping.canonical(&m.name);
        match layout.take_hf(canonical.as_deref().unwrap_or(&m.name)) {
            Some(Taken::Map { rule, .. }) => {
                let fits = !rule.keeps_names() || rule.fits_part(&m.logical_dims());
                !rule.is_identity() && fits
            }
            Some(Taken::Drop { .. }) | None => false,
        }
    };
    let as_layout = |layout: &Layout, m: &Matrix| match layout.take_to(&m.name) {
        Some(Taken::Map { rule, .. }) => {
            let fits = !rule.keeps_names() || rule.fits_layout(&m.logical_dims());
            !rule.is_identity() && fits
        }
        Some(Taken::Drop { .. }) | None => false,
    };
    let mut best = (LayoutName::Hf, 0);
    for layout in mapping.layouts() {
        let (hf, n) = (count(&|m| as_hf(layout, m)), count(&|m| as_layout(layout, m)));
        if n > hf.max(best.1) {
            best = (layout.name, n);
        }
    }
    let quantized = matrices.iter().any(|m| m.scales.is_some());
    let named = matrices.iter().any(|m| mapping.layouts().any(|l| l.take_hf(&m.name).is_some()));
    if best.0 == LayoutName::Hf && !quantized && !named {
        return Err(PlanError::UnknownLayout {
            model: mapping.name.clone(),
            tensors: checkpoint.tensors().len(),
        });
    }
    Ok(best.0)
}
