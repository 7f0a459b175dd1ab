//! Fragments: a box of a view tensor and the box of a source matrix that it is copied from.

use super::MatrixId;
use crate::tensor::{BoxMap, Shape, coalesce};

/// Maximum number of fragments of one tensor: experts times the matrices of each. The largest
/// published model has 1,800. The bound is needed because a config.json, or a sparse file of some
/// KiB, can ask for any number.
pub(super) const MAX_FRAGMENTS: u64 = 1 << 16;

/// A box of a view tensor and the box of a matrix that it is copied from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    /// Target: the view's tensor. Source: the matrix.
    pub map: BoxMap,
    /// The matrix.
    pub matrix: MatrixId,
}

/// The fragments of a tensor, sorted by target; adjacent boxes of one matrix are merged.
pub(super) fn fragments_of(parts: Vec<(MatrixId, BoxMap)>) -> Vec<Fragment> {
    coalesce(parts).into_iter().map(|(matrix, map)| Fragment { map, matrix }).collect()
}

/// Whether the fragments cover a tensor of this shape, each element exactly once.
pub(super) fn covers(shape: &Shape, fragments: &[Fragment]) -> bool {
    let within = |f: &Fragment| {
        f.map.target.len() == shape.rank()
            && (0..shape.rank()).all(|a| f.map.target_span(a).1 < shape.dims()[a])
    };
    let total: u64 = fragments.iter().map(|f| f.map.elements()).sum();
    if Some(total) != shape.elements() {
        return false;
    }
    // Nothing to cover; the checks below need boxes that are not empty.
    if total == 0 {
        return true;
    }
    if !fragments.iter().all(within) {
        return false;
    }
    if shape.rank() == 0 {
        return fragments.len() == 1;
    }
    // Fragments are sorted by target, so only those that meet on the first axis can overlap.
    let mut open: Vec<&Fragment> = Vec::new();
    for f in fragments {
        let (first, _) = f.map.target_span(0);
        open.retain(|o| o.map.target_span(0).1 >= first);
        if open.iter().any(|o| o.map.overlaps(&f.map)) {
            return false;
        }
        open.push(f);
    }
    true
}
