//! Chooses the body of a tensor: verbatim byte ranges where possible, computed chunks otherwise.

use crate::plan::{Computed, Fragment, Grid, Matrix, Origin, SourceRange};
use crate::tensor::{BoxMap, DType, Shape};

/// The byte ranges of source tensors that are the tensor's bytes. `None` unless every fragment is
/// of a plain matrix of the same dtype and contiguous on both sides. Adjacent ranges are merged.
pub(super) fn verbatim_runs(
    shape: &Shape,
    dtype: DType,
    fragments: &[Fragment],
    matrices: &[Matrix],
) -> Option<Vec<SourceRange>> {
    let bits = u64::from(dtype.bits());
    let bytes = |elements: u64| {
        let bits = elements.checked_mul(bits)?;
        bits.is_multiple_of(8).then_some(bits / 8)
    };
    let strides = shape.strides();
    let mut runs: Vec<SourceRange> = Vec::with_capacity(fragments.len());
    for f in fragments {
        let matrix = &matrices[f.matrix.index()];
        if matrix.scales.is_some() || matrix.dtype != dtype {
            return None;
        }
        let (at, from) = contiguous(&f.map, &strides, &matrix.shape.strides())?;
        let run = SourceRange {
            at: bytes(at)?,
            bytes: bytes(f.map.elements())?,
            origin: Origin::Source,
            source: matrix.payload,
            offset: bytes(from)?,
        };
        match runs.last_mut() {
            Some(last) if last.at + last.bytes != run.at => return None,
            Some(last) if last.source == run.source && last.offset + last.bytes == run.offset => {
                last.bytes += run.bytes;
            }
            Some(_) | None => runs.push(run),
        }
    }
    let whole = runs.first().is_none_or(|r| r.at == 0);
    let end = runs.last().map_or(0, |r| r.at + r.bytes);
    (whole && Some(end) == shape.bytes(dtype)).then_some(runs)
}

/// The first elements on both sides, where the map is one contiguous range on both.
fn contiguous(map: &BoxMap, target: &[u64], source: &[u64]) -> Option<(u64, u64)> {
    let mut moves = vec![(0, 0); map.extent.len()];
    let (mut at, mut from) = (0, 0);
    for (axis, stride) in map.target.iter().zip(target) {
        at += axis.start * stride;
        if let Some(k) = axis.along {
            moves[usize::from(k)].0 = axis.step * stride;
        }
    }
    for (axis, stride) in map.source.iter().zip(source) {
        from += axis.start * stride;
        if let Some(k) = axis.along {
            moves[usize::from(k)].1 = axis.step * stride;
        }
    }
    let mut axes: Vec<_> = moves.into_iter().zip(&map.extent).collect();
    axes.sort();
    let mut expected = 1;
    for ((t, s), extent) in axes {
        if t != expected || s != expected {
            return None;
        }
        expected *= extent;
    }
    Some((at, from))
}

/// The computed body of a tensor, with an index of fragments by plane.
pub(super) fn computed(shape: &Shape, dtype: DType, fragments: Vec<Fragment>) -> Computed {
    let grid = Grid::new(shape, u64::from(dtype.bits() / 8));
    let position = |i: usize| u32::try_from(i).expect("the planner bounds the fragments");
    // A fragment lies in a single plane if none of its axes runs along an outer axis.
    let outer = shape.rank().saturating_sub(2);
    let single = |f: &Fragment| f.map.target[..outer].iter().all(|a| a.along.is_none());
    let mut planes = Vec::new();
    if outer > 0 && fragments.len() > 1 && fragments.iter().all(single) {
        let strides = Shape::new(&shape.dims()[..outer]).strides();
        let plane_of = |f: &Fragment| -> u64 {
            f.map.target[..outer].iter().zip(&strides).map(|(a, s)| a.start * s).sum()
        };
        let mut next = 0;
        for plane in 0..grid.planes {
            let start = next;
            while next < fragments.len() && plane_of(&fragments[next]) == plane {
                next += 1;
            }
            planes.push(position(start)..position(next));
        }
    }
    Computed { grid, fragments, planes }
}
