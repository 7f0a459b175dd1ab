//! Tensors of the checkpoint as wholes: one matrix each, or the pieces of one tensor that processes
//! of a training run wrote to shards of their own.

use std::collections::{BTreeMap, HashSet};

use crate::mapping::{Layout, ResolvedMapping, RuleMatch};
use crate::plan::fragment::{covers, fragments_of};
use crate::plan::report::{Problem, Problems};
use crate::plan::{Fragment, Matrix, MatrixId};
use crate::source::Checkpoint;
use crate::tensor::{BoxMap, Shape};

/// A tensor of the checkpoint.
#[derive(Debug)]
pub(in crate::plan) struct WholeTensor<'a> {
    /// Name in the checkpoint, without the suffixes of a quantized matrix's parts.
    pub name: &'a str,
    /// Name of the tensor that holds its elements or their codes.
    pub payload_name: &'a str,
    /// Whether its shards say that they hold pieces.
    pub in_pieces: bool,
    /// Extents of the tensor.
    pub shape: Vec<u64>,
    /// Target: the tensor. Source: the matrix.
    pub parts: Vec<(MatrixId, BoxMap)>,
}

impl WholeTensor<'_> {
    /// The tensor's fragments, in the order of their targets.
    pub(in crate::plan) fn fragments(&self) -> Vec<Fragment> {
        fragments_of(self.parts.clone())
    }
}

/// The tensors of a checkpoint in the order of its matrices; notes pieces that are no whole.
pub(in crate::plan) fn whole_tensors<'a>(
    matrices: &'a [Matrix],
    checkpoint: &'a Checkpoint,
    problems: &mut Problems,
) -> Vec<WholeTensor<'a>> {
    let mut wholes: Vec<WholeTensor<'a>> = Vec::with_capacity(matrices.len());
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
            wholes.push(WholeTensor { name, payload_name, in_pieces: false, shape: dims, parts });
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
            Some(&i) if wholes[i].shape.len() == dims.len() => {
                let shape = &mut wholes[i].shape;
                shape.iter_mut().zip(ends).for_each(|(extent, end)| *extent = end.max(*extent));
                wholes[i].parts.push((id, map));
            }
            Some(_) => problems.explain(Problem::Pieces, &matrix.name, "pieces of other ranks"),
            None => {
                pieces.insert(&matrix.name, wholes.len());
                let shape = ends.collect();
                let (name, parts) = (&*matrix.name, vec![(id, map)]);
                wholes.push(WholeTensor { name, payload_name, in_pieces: true, shape, parts });
            }
        }
    }
    for i in pieces.into_values() {
        check(&wholes[i], matrices, problems);
    }
    wholes
}

/// Notes pieces of several dtypes, and such as leave gaps or overlap.
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

/// Notes tensors in pieces whose extents are not those that the mapping states.
///
/// Nothing in the shards says how large the whole is, so the last pieces of all tensors can be
/// missing with the file of a process.
pub(in crate::plan) fn check_extents(
    wholes: &[WholeTensor<'_>],
    mapping: &ResolvedMapping,
    source: Option<&Layout>,
    problems: &mut Problems,
) {
    for whole in wholes.iter().filter(|w| w.in_pieces) {
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
