//! A box of a view tensor and the box of a source matrix that it is copied from.

use super::MatrixId;
use crate::tensor::{BoxMap, Shape, coalesce};

/// Most pieces of one tensor: experts times the matrices of each. The largest published have 1,800;
/// a sparse file of some KiB can hold a tensor of any number of rows.
pub(super) const MAX_FRAGMENTS: u64 = 1 << 16;

/// A box of the view's tensor and the box of a matrix that it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    /// Target: the view's tensor. Source: the matrix.
    pub map: BoxMap,
    /// The matrix.
    pub matrix: MatrixId,
}

pub(super) fn fragments_of(parts: Vec<(MatrixId, BoxMap)>) -> Vec<Fragment> {
    coalesce(parts).into_iter().map(|(matrix, map)| Fragment { map, matrix }).collect()
}

/// Whether the fragments cover a tensor of this shape, each element once.
pub(super) fn covers(shape: &Shape, fragments: &[Fragment]) -> bool {
    let within = |f: &Fragment| {
        f.map.target.len() == shape.rank()
            && (0..shape.rank()).all(|a| f.map.target_span(a).1 < shape.dims()[a])
    };
    let total: u64 = fragments.iter().map(|f| f.map.elements()).sum();
    if Some(total) != shape.elements() {
        return false;
    }
    // Nothing to cover; a box without elements has no last one.
    if total == 0 {
        return true;
    }
    if !fragments.iter().all(within) {
        return false;
    }
    if shape.rank() == 0 {
        return fragments.len() == 1;
    }
    // Fragments come in the order of their targets; only those whose first axes meet can overlap.
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
