//! The operations of rules: transpose, concat, interleave, split, rotary, stack.
//!
//! An operation acts on a list of tensors. A rule starts with one tensor for each published name
//! and ends with one for each name in the layout. Applying its operations to shapes gives, for each
//! layout tensor, the boxes of published tensors that it consists of ([`RuleFragment`]). For the
//! way back, [`disassembled_shape`] derives the published shape from the layout's, and the same
//! fragments are used with their two sides exchanged.

use crate::tensor::{Axis, BoxMap, to_u64};

/// One operation of a rule, described from the published tensors to the layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// Exchanges the last two axes.
    Transpose,
    /// Joins all tensors along an axis, in the order of their names.
    Concat {
        /// The axis along which they follow one another.
        axis: usize,
    },
    /// Joins all tensors along an axis, taking one index of each in turn.
    Interleave {
        /// The axis along which they alternate.
        axis: usize,
    },
    /// Cuts one tensor into equal parts along an axis, one for each name in the layout.
    Split {
        /// The axis that is cut.
        axis: usize,
        /// Number of parts.
        parts: u64,
    },
    /// Within each of `heads` heads, reorders an axis from adjacent rotary pairs (`0 1 | 2 3 | …`)
    /// to halves (`0 2 4 … | 1 3 5 …`).
    Rotary {
        /// The axis whose extent is heads times head size.
        axis: usize,
        /// Number of heads.
        heads: u64,
        /// Positions of the tensors to reorder; the others stay as they are.
        of: Vec<usize>,
    },
    /// Stacks the tensors of all values of an index variable along a new first axis.
    Stack {
        /// Number of values.
        count: u64,
    },
}

/// Why an operation cannot be applied to a shape.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OpError {
    /// The shape does not have the axis.
    #[error("needs an axis {axis}, but the shape is {shape:?}")]
    NoAxis {
        /// The axis of the operation; 1 for a transpose, which needs two axes.
        axis: usize,
        /// The shape before the operation.
        shape: Vec<u64>,
    },
    /// Tensors to join have different shapes.
    #[error("joins tensors of different shapes: {first:?} and {other:?}")]
    Unequal {
        /// Shape of the first tensor.
        first: Vec<u64>,
        /// The shape of another tensor.
        other: Vec<u64>,
    },
    /// An extent is not divisible by the number of parts.
    #[error("axis {axis} of {shape:?} cannot be cut into {parts} equal parts")]
    Indivisible {
        /// The axis that is cut.
        axis: usize,
        /// The shape before the cut.
        shape: Vec<u64>,
        /// Number of parts.
        parts: u64,
    },
    /// The operation needs another number of tensors.
    #[error("takes {expected} tensors, got {got}")]
    Count {
        /// Tensors that the operation needs.
        expected: usize,
        /// Tensors at this point of the rule.
        got: usize,
    },
}

/// A box of a layout tensor and the box of a published tensor that it is copied from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RuleFragment {
    /// Position of the published tensor's name in the rule's `hf`.
    pub part: usize,
    /// Value of the stacked variable, where the rule stacks.
    pub stacked: Option<u64>,
    /// Target: the layout tensor. Source: the published tensor.
    pub map: BoxMap,
}

/// A layout tensor that a rule assembles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AssembledTensor {
    /// Extents, outermost first.
    pub shape: Vec<u64>,
    /// Disjoint fragments that cover it.
    pub fragments: Vec<RuleFragment>,
}

/// Applies a rule's operations to published tensors of these shapes, one for each name.
///
/// # Errors
/// An operation cannot be applied to a shape.
pub(crate) fn assemble(ops: &[Op], shapes: &[Vec<u64>]) -> Result<Vec<AssembledTensor>, OpError> {
    let mut state: Vec<AssembledTensor> = shapes
        .iter()
        .enumerate()
        .map(|(part, shape)| AssembledTensor {
            shape: shape.clone(),
            fragments: vec![RuleFragment { part, stacked: None, map: BoxMap::identity(shape) }],
        })
        .collect();
    for op in ops {
        state = apply(op, state)?;
    }
    Ok(state)
}

/// The inverse of [`assemble`] on shapes: from the shapes of the layout tensors to the one shape
/// that all published tensors of the rule have. `parts` is the number of published names.
///
/// # Errors
/// No published tensors could give these shapes.
pub(crate) fn disassembled_shape(
    ops: &[Op],
    parts: usize,
    layout_shapes: &[Vec<u64>],
) -> Result<Vec<u64>, OpError> {
    let mut shapes = layout_shapes.to_vec();
    let mut joined = parts;
    for op in ops.iter().rev() {
        let first = shapes.first().cloned().ok_or(OpError::Count { expected: 1, got: 0 })?;
        if let Some(other) = shapes.iter().find(|s| **s != first) {
            return Err(OpError::Unequal { first, other: other.clone() });
        }
        let mut shape = first;
        match op.clone() {
            Op::Transpose => transpose_shape(&mut shape)?,
            Op::Concat { axis } | Op::Interleave { axis } => {
                let n = to_u64(joined);
                let cut = divided(&shape, axis, n)?;
                shape[axis] = cut;
                joined = 1;
            }
            Op::Split { axis, parts } => {
                let axis = axis_of(&shape, axis)?;
                shape[axis] *= parts;
            }
            Op::Rotary { axis, heads, .. } => {
                divided(&shape, axis, heads.saturating_mul(2))?;
            }
            Op::Stack { count } => {
                if shape.first() != Some(&count) {
                    return Err(OpError::Indivisible { axis: 0, shape, parts: count });
                }
                shape.remove(0);
            }
        }
        shapes = vec![shape];
    }
    shapes.into_iter().next().ok_or(OpError::Count { expected: 1, got: 0 })
}

fn apply(op: &Op, state: Vec<AssembledTensor>) -> Result<Vec<AssembledTensor>, OpError> {
    match *op {
        Op::Transpose => state
            .into_iter()
            .map(|mut t| {
                let rank = t.shape.len();
                transpose_shape(&mut t.shape)?;
                for fragment in &mut t.fragments {
                    fragment.map.target.swap(rank - 2, rank - 1);
                }
                Ok(t)
            })
            .collect(),
        Op::Concat { axis } => join(state, axis, |i, extent, _| (i * extent, 1)),
        Op::Interleave { axis } => join(state, axis, |i, _, n| (i, n)),
        Op::Split { axis, parts } => split(state, axis, parts),
        Op::Rotary { axis, heads, ref of } => {
            let at = |(i, t)| if of.contains(&i) { rotary(t, axis, heads) } else { Ok(t) };
            state.into_iter().enumerate().map(at).collect()
        }
        Op::Stack { count } => Ok(state.into_iter().map(|t| stack(t, count)).collect()),
    }
}

/// Joins all tensors along `axis`. `place(i, extent, n)` gives start and step of the `i`-th of `n`
/// tensors on that axis.
fn join(
    state: Vec<AssembledTensor>,
    axis: usize,
    place: impl Fn(u64, u64, u64) -> (u64, u64),
) -> Result<Vec<AssembledTensor>, OpError> {
    let n = to_u64(state.len());
    let first = state.first().map(|t| t.shape.clone()).unwrap_or_default();
    axis_of(&first, axis)?;
    let mut shape = first.clone();
    shape[axis] *= n;
    let mut fragments = Vec::new();
    for (i, t) in (0..).zip(state) {
        if t.shape != first {
            return Err(OpError::Unequal { first, other: t.shape });
        }
        let (start, step) = place(i, first[axis], n);
        fragments.extend(t.fragments.into_iter().map(|mut fragment| {
            let a = &mut fragment.map.target[axis];
            a.start = start + a.start * step;
            if a.along.is_some() {
                a.step *= step;
            }
            fragment
        }));
    }
    Ok(vec![AssembledTensor { shape, fragments }])
}

fn split(
    state: Vec<AssembledTensor>,
    axis: usize,
    parts: u64,
) -> Result<Vec<AssembledTensor>, OpError> {
    let [whole] = <[AssembledTensor; 1]>::try_from(state)
        .map_err(|s| OpError::Count { expected: 1, got: s.len() })?;
    let extent = divided(&whole.shape, axis, parts)?;
    let mut shape = whole.shape.clone();
    shape[axis] = extent;
    Ok((0..parts)
        .map(|i| {
            let mut origin = vec![0; shape.len()];
            origin[axis] = i * extent;
            let fragments = whole
                .fragments
                .iter()
                .filter_map(|p| {
                    let map = p.map.within(&origin, &shape)?.relative_to(&origin);
                    Some(RuleFragment { map, ..p.clone() })
                })
                .collect();
            AssembledTensor { shape: shape.clone(), fragments }
        })
        .collect())
}

fn rotary(t: AssembledTensor, axis: usize, heads: u64) -> Result<AssembledTensor, OpError> {
    let half = divided(&t.shape, axis, heads.saturating_mul(2))?;
    let mut fragments = Vec::new();
    for head in 0..heads {
        for odd in 0..2 {
            // Rows of one half: contiguous in the layout, every second one in the published tensor.
            let base = head * 2 * half;
            let mut start = vec![0; t.shape.len()];
            let mut extent = t.shape.clone();
            start[axis] = base + odd * half;
            extent[axis] = half;
            let mut map = BoxMap::region(&start, &extent);
            map.source[axis].start = base + odd;
            if map.source[axis].along.is_some() {
                map.source[axis].step = 2;
            }
            fragments.extend(
                t.fragments
                    .iter()
                    .filter_map(|p| Some(RuleFragment { map: map.after(&p.map)?, ..p.clone() })),
            );
        }
    }
    Ok(AssembledTensor { shape: t.shape, fragments })
}

fn stack(t: AssembledTensor, count: u64) -> AssembledTensor {
    let mut shape = t.shape;
    shape.insert(0, count);
    let fragments = (0..count)
        .flat_map(|e| {
            t.fragments.iter().map(move |p| {
                let mut map = p.map.clone();
                map.target.insert(0, Axis::fixed(e));
                RuleFragment { part: p.part, stacked: Some(e), map }
            })
        })
        .collect();
    AssembledTensor { shape, fragments }
}

fn axis_of(shape: &[u64], axis: usize) -> Result<usize, OpError> {
    if axis < shape.len() { Ok(axis) } else { Err(OpError::NoAxis { axis, shape: shape.to_vec() }) }
}

fn divided(shape: &[u64], axis: usize, parts: u64) -> Result<u64, OpError> {
    let extent = shape[axis_of(shape, axis)?];
    if parts == 0 || !extent.is_multiple_of(parts) {
        return Err(OpError::Indivisible { axis, shape: shape.to_vec(), parts });
    }
    Ok(extent / parts)
}

fn transpose_shape(shape: &mut [u64]) -> Result<(), OpError> {
    let rank = shape.len();
    if rank < 2 {
        return Err(OpError::NoAxis { axis: 1, shape: shape.to_vec() });
    }
    shape.swap(rank - 2, rank - 1);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn covers(t: &AssembledTensor) -> bool {
        let total: u64 = t.fragments.iter().map(|p| p.map.elements()).sum();
        let apart = t
            .fragments
            .iter()
            .enumerate()
            .all(|(i, a)| t.fragments[..i].iter().all(|b| !a.map.overlaps(&b.map)));
        total == t.shape.iter().product::<u64>() && apart
    }

    #[test]
    fn grouped_experts_have_two_fragments_each() {
        let ops = [Op::Transpose, Op::Concat { axis: 1 }, Op::Stack { count: 3 }];
        let out = assemble(&ops, &[vec![5, 7], vec![5, 7]]).unwrap();
        assert_eq!(out.len(), 1);
        assert_eq!(out[0].shape, [3, 7, 10]);
        assert_eq!(out[0].fragments.len(), 6);
        assert!(covers(&out[0]));
        let up_of_2 = &out[0].fragments[5];
        assert_eq!((up_of_2.part, up_of_2.stacked), (1, Some(2)));
        assert_eq!(up_of_2.map.target_span(2), (5, 9));
        assert_eq!(disassembled_shape(&ops, 2, &[vec![3, 7, 10]]).unwrap(), [5, 7]);
    }

    #[test]
    fn rotary_reorders_rows_from_pairs_to_halves() {
        let out =
            assemble(&[Op::Rotary { axis: 0, heads: 2, of: vec![0] }], &[vec![8, 1]]).unwrap();
        let mut source_of = [0; 8];
        for fragment in &out[0].fragments {
            for i in 0..fragment.map.elements() {
                let (t, s) = (fragment.map.target[0], fragment.map.source[0]);
                source_of[usize::try_from(t.start + t.step * i).unwrap()] = s.start + s.step * i;
            }
        }
        assert_eq!(source_of, [0, 2, 1, 3, 4, 6, 5, 7]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        type Case<'a> = (&'a [Op], &'a [Vec<u64>], &'a str);
        let cases: [Case<'_>; 4] = [
            (&[Op::Transpose], &[vec![4]], "needs an axis 1, but the shape is [4]"),
            (
                &[Op::Concat { axis: 0 }],
                &[vec![4, 2], vec![3, 2]],
                "joins tensors of different shapes: [4, 2] and [3, 2]",
            ),
            (
                &[Op::Split { axis: 0, parts: 3 }],
                &[vec![4, 2]],
                "axis 0 of [4, 2] cannot be cut into 3 equal parts",
            ),
            (
                &[Op::Split { axis: 0, parts: 2 }],
                &[vec![4, 2], vec![4, 2]],
                "takes 1 tensors, got 2",
            ),
        ];
        for (ops, shapes, message) in cases {
            assert_eq!(assemble(ops, shapes).unwrap_err().to_string(), message);
        }
    }

    fn any_ops() -> impl Strategy<Value = (Vec<Op>, usize)> {
        let head = prop_oneof![
            Just(vec![]),
            Just(vec![Op::Transpose]),
            Just(vec![Op::Rotary { axis: 0, heads: 2, of: vec![0] }]),
            Just(vec![Op::Rotary { axis: 1, heads: 1, of: vec![0, 1] }, Op::Transpose]),
        ];
        let join = prop_oneof![
            Just((vec![], 1)),
            (0usize..2, 2usize..4).prop_map(|(axis, n)| (vec![Op::Concat { axis }], n)),
            (0usize..2, 2usize..4).prop_map(|(axis, n)| (vec![Op::Interleave { axis }], n)),
            (0usize..2).prop_map(|axis| (vec![Op::Split { axis, parts: 2 }], 1)),
        ];
        let tail = prop_oneof![Just(vec![]), Just(vec![Op::Stack { count: 3 }])];
        (head, join, tail).prop_map(|(a, (b, n), c)| ([a, b, c].concat(), n))
    }

    proptest! {
        #[test]
        fn fragments_cover_and_shapes_are_restored(
            (ops, parts) in any_ops(), rows in 1u64..4, cols in 1u64..4,
        ) {
            let shape = vec![rows * 4, cols * 4];
            let out = assemble(&ops, &vec![shape.clone(); parts]).unwrap();
            prop_assert!(out.iter().all(covers));
            let shapes: Vec<_> = out.iter().map(|t| t.shape.clone()).collect();
            prop_assert_eq!(disassembled_shape(&ops, parts, &shapes).unwrap(), shape);
        }
    }
}
