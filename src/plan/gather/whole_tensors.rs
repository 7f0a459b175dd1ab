//! Whole tensors: each is one matrix, or is put together from pieces. The processes of a training
//! run can each save a piece of a tensor to a shard of their own (Automodel's `shard-*` files).

use std::collections::{BTreeMap, HashSet};

use crate::mapping::{Layout, ResolvedMapping, RuleMatch};
use crate::plan::fragment::{covers, fragments_of};
use crate::plan::report::{Problem, Problems};
use crate::plan::{Fragment, Matrix, MatrixId};
use crate::source::Checkpoint;
use crate::tensor::{BoxMap, Shape};

/// A whole tensor of the checkpoint.
#[derive(Debug)]
pub(in crate::plan) struct WholeTensor<'a> {
    /// Name in the checkpoint; for a quantized matrix, the name of the decoded one.
    pub name: &'a str,
    /// Name of the stored tensor with its elements or codes.
    pub payload_name: &'a str,
    /// Whether it is put together from pieces.
    pub in_pieces: bool,
    /// Extents of the tensor.
    pub shape: Vec<u64>,
    /// The boxes of matrices that it consists of. Target: the tensor. Source: the matrix.
    pub parts: Vec<(MatrixId, BoxMap)>,
}

impl WholeTensor<'_> {
    /// The tensor's fragments, sorted by target.
    pub(in crate::plan) fn fragments(&self) -> Vec<Fragment> {
        fragments_of(self.parts.clone())
    }
}

/// The whole tensors of a checkpoint, in the order of its matrices. Notes pieces that do not fit
/// together.
pub(in crate::plan) fn whole_tensors<'a>(
    matrices: &'a [Matrix],
    checkpoint: &'a Checkpoint,
    problems: &mut Problems,
) -> Vec<WholeTensor<'a>> {
    let mut whole_tensors: Vec<WholeTensor<'a>> = Vec::with_capacity(matrices.len());
    let mut pieces: BTreeMap<&str, usize> = BTreeMap::new();
    let is_quantized =
        |m: &&Matrix| m.scales.is_some() && checkpoint.tensor(m.payload).piece_at.is_some();
    let quantized: HashSet<&str> = matrices.iter().filter(is_quantized).map(|m| &*m.name).collect();
    for (id, matrix) in (0..).map(MatrixId).zip(matrices) {
        let mut map = matrix.logical_map();
        let dims = matrix.logical_dims();
        let stored = checkpoint.tensor(matrix.payload);
        let (at, payload_name) = (stored.piece_at.as_deref(), &*stored.name);
        let Some(at) = at.filter(|at| at.len() == dims.len() && matrix.scales.is_none()) else {
            let (name, parts) = (&*matrix.name, vec![(id, map)]);
            whole_tensors.push(WholeTensor {
                name,
                payload_name,
                in_pieces: false,
                shape: dims,
                parts,
            });
            continue;
        };
        if quantized.contains(&*matrix.name) {
            problems.explain(Problem::Pieces, &matrix.name, "pieces of a quantized matrix");
            continue;
        }
        for (axis, start) in map.target.iter_mut().zip(at) {
            axis.start += start;
        }
        let ends = at.iter().zip(&dims).map(|(start, n)| start + n);
        match pieces.get(&*matrix.name) {
            Some(&i) if whole_tensors[i].shape.len() == dims.len() => {
                let shape = &mut whole_tensors[i].shape;
                shape.iter_mut().zip(ends).for_each(|(extent, end)| *extent = end.max(*extent));
                whole_tensors[i].parts.push((id, map));
            }
            Some(_) => problems.explain(Problem::Pieces, &matrix.name, "pieces of other ranks"),
            None => {
                pieces.insert(&matrix.name, whole_tensors.len());
                let shape = ends.collect();
                let (name, parts) = (&*matrix.name, vec![(id, map)]);
                whole_tensors.push(WholeTensor {
                    name,
                    payload_name,
                    in_pieces: true,
                    shape,
                    parts,
                });
            }
        }
    }
    for i in pieces.into_values() {
        check(&whole_tensors[i], matrices, problems);
    }
    whole_tensors
}

/// Notes pieces that have different dtypes, leave gaps, or overlap.
fn check(whole: &WholeTensor<'_>, matrices: &[Matrix], problems: &mut Problems) {
    let dtype = |(id, _): &(MatrixId, BoxMap)| matrices[id.index()].dtype;
    let first = dtype(&whole.parts[0]);
    if let Some(other) = whole.parts.iter().map(dtype).find(|d| *d != first) {
        let what = format!("expected {first} in every piece, got {other} in one");
        problems.explain(Problem::Pieces, whole.name, what);
    } else if !covers(&Shape::new(whole.shape.as_slice()), &whole.fragments()) {
        let n = whole.parts.len();
        let what = format!("expected all of {:?}, got {n} that leave gaps or overlap", whole.shape);
        problems.explain(Problem::Pieces, whole.name, what);
        problems.mark_refused(whole.name.to_owned());
    }
}

/// Compares tensors that were put together from pieces with the `piece-shape` of the mapping.
///
/// The shards do not say how large the whole tensor is. If the file of the last process is missing,
/// the pieces that are there still fit together.
pub(in crate::plan) fn check_extents(
    whole_tensors: &[WholeTensor<'_>],
    mapping: &ResolvedMapping,
    source: Option<&Layout>,
    problems: &mut Problems,
) {
    for whole in whole_tensors.iter().filter(|w| w.in_pieces) {
        let taken = match source {
            Some(layout) => layout.match_to(whole.name),
            None => mapping.layouts().find_map(|layout| layout.match_hf(whole.name)),
        };
        let Some(RuleMatch::Map { rule, .. }) = taken else { continue };
        if let Some(expected) = rule.piece_shape.as_ref().filter(|e| **e != whole.shape) {
            let got = &whole.shape;
            let what = format!("expected {expected:?}, got {got:?}: is a process's shard missing?");
            problems.explain(Problem::Pieces, whole.name, what);
        }
    }
}
