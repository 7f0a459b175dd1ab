//! From the matrices of a source layout to the tensors of a target layout, through the
//! checkpoint's logical tensors: two affine maps, composed.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};

use super::group::{self, Group, Groups};
use super::{Dropped, Leftover, Logical, LogicalTensors, Target};
use crate::mapping::{Assembled, Bindings, Layout, Resolved, Rule, Taken};
use crate::plan::Matrix;
use crate::plan::fragment::{MOST_PIECES, fragments_of};
use crate::plan::gather::Whole;
use crate::plan::report::{Problem, Problems};

/// Logical tensors of a source that is in the published layout.
pub(in crate::plan) fn from_published(
    wholes: &[Whole<'_>],
    mapping: &Resolved,
    problems: &mut Problems,
) -> LogicalTensors {
    let mut logical = LogicalTensors::new();
    for whole in wholes {
        let name = mapping.canonical(whole.name).unwrap_or_else(|| whole.name.to_owned());
        match logical.entry(name) {
            Entry::Vacant(entry) => {
                entry.insert(Logical { shape: whole.shape.clone(), parts: whole.parts.clone() });
            }
            Entry::Occupied(entry) => {
                let first = entry.get().parts[0].0;
                let first = wholes.iter().find(|w| w.parts.iter().any(|(m, _)| *m == first));
                let first = first.map_or(whole.stored, |w| w.stored);
                let what = format!("`{first}` and `{}`", whole.stored);
                problems.explain(Problem::SameName, entry.key(), what);
            }
        }
    }
    logical
}

/// Logical tensors of a source that is in a grouped layout: its tensors taken apart.
///
/// Where there are several published forms they are those of `original`, else the usual ones.
pub(in crate::plan) fn from_layout(
    wholes: &[Whole<'_>],
    layout: &Layout,
    original: Option<&[Matrix]>,
    dropped: &mut Dropped,
    leftovers: &mut Vec<Leftover>,
    problems: &mut Problems,
) -> LogicalTensors {
    type Slots<'w> = Vec<Option<&'w Whole<'w>>>;
    let mut groups: BTreeMap<(usize, Bindings), (&Rule, Slots<'_>)> = BTreeMap::new();
    let published: HashSet<&str> = original.into_iter().flatten().map(|m| &*m.name).collect();
    for whole in wholes {
        match layout.take_to_as(whole.name, |name| published.contains(name)) {
            Some(Taken::Map { row, rule, part, bindings }) => {
                let slots = groups
                    .entry((row, bindings))
                    .or_insert_with(|| (rule, vec![None; rule.to.len()]));
                slots.1[part] = Some(whole);
            }
            Some(Taken::Drop { reason }) => *dropped.entry(reason.to_owned()).or_default() += 1,
            None => leftovers.extend(whole.parts.iter().map(|(m, _)| *m)),
        }
    }
    let mut logical: BTreeMap<String, (Logical, &str)> = BTreeMap::new();
    for ((_, bindings), (rule, slots)) in groups {
        let name = |j: usize| rule.to[j].format(&bindings, &rule.vars).unwrap_or_default();
        let Some(sources) = all_there(&slots, name, problems) else { continue };
        let Some((shape, tensors)) = taken_apart(rule, &sources, problems) else {
            problems.refuse_matrix(name(0));
            continue;
        };
        let mut parts: BTreeMap<String, Logical> = BTreeMap::new();
        for (tensor, whole) in tensors.into_iter().zip(&sources) {
            for piece in tensor.pieces {
                let Some(name) = rule.part_name(piece.part, piece.stacked, &bindings) else {
                    continue;
                };
                let empty = || Logical { shape: shape.clone(), parts: Vec::new() };
                let from_whole = piece.map.inverse();
                let maps = whole
                    .parts
                    .iter()
                    .filter_map(|(m, of_matrix)| from_whole.after(of_matrix).map(|map| (*m, map)));
                parts.entry(name).or_insert_with(empty).parts.extend(maps);
            }
        }
        for (name, part) in parts {
            match logical.entry(name) {
                Entry::Vacant(entry) => {
                    entry.insert((part, sources[0].name));
                }
                Entry::Occupied(entry) => {
                    let what = format!("`{}` and `{}`", entry.get().1, sources[0].name);
                    problems.explain(Problem::SameName, entry.key(), what);
                }
            }
        }
    }
    logical.into_iter().map(|(name, (tensor, _))| (name, tensor)).collect()
}

/// Shape of the parts of a layout's tensors, and which of their elements are whose.
fn taken_apart(
    rule: &Rule,
    sources: &[&Whole<'_>],
    problems: &mut Problems,
) -> Option<(Vec<u64>, Vec<Assembled>)> {
    let shapes: Vec<Vec<u64>> = sources.iter().map(|w| w.shape.clone()).collect();
    let refuse = |problems: &mut Problems, j: usize, what: String| {
        problems.explain(Problem::RuleShape, sources[j].name, what);
        None
    };
    if let Some(j) = empty_part(rule, &shapes) {
        return refuse(problems, j, format!("expected elements, got {:?}", shapes[j]));
    }
    let shape = match rule.part_shape(&shapes) {
        Ok(shape) => shape,
        Err(error) => return refuse(problems, 0, error.to_string()),
    };
    if !has_few_pieces(rule, sources[0].name, problems) {
        return None;
    }
    let tensors = match rule.assemble(&vec![shape.clone(); rule.hf.len()]) {
        Ok(tensors) => tensors,
        Err(error) => return refuse(problems, 0, error.to_string()),
    };
    if let Some(expected) = rule.hf_shape.as_ref().filter(|e| **e != shape) {
        return refuse(problems, 0, format!("expected parts of {expected:?}, got {shape:?}"));
    }
    match (0..sources.len()).find(|&j| tensors[j].shape != shapes[j]) {
        Some(j) => {
            refuse(problems, j, format!("expected {:?}, got {:?}", tensors[j].shape, shapes[j]))
        }
        None => Some((shape, tensors)),
    }
}

/// Target tensors of a grouped layout, assembled from logical tensors.
pub(in crate::plan) fn to_layout(
    logical: &LogicalTensors,
    layout: &Layout,
    dropped: &mut Dropped,
    leftovers: &mut Vec<Leftover>,
    problems: &mut Problems,
) -> Vec<Target> {
    let mut groups = Groups::new();
    for (name, tensor) in logical {
        match layout.take_hf(name) {
            Some(Taken::Map { row, rule, part, bindings }) => {
                let stacked = rule.stack.and_then(|var| bindings.index(var));
                let key = match rule.stack {
                    Some(var) => bindings.with(var, None),
                    None => bindings,
                };
                let group = groups.entry((row, key)).or_insert_with(|| Group::new(rule));
                group.parts.insert((part, stacked), tensor);
            }
            Some(Taken::Drop { reason }) => *dropped.entry(reason.to_owned()).or_default() += 1,
            None => leftovers.extend(tensor.parts.iter().map(|(m, _)| *m)),
        }
    }
    group::add_siblings(&mut groups, layout);
    let mut targets = Vec::new();
    for ((_, bindings), group) in groups {
        targets.extend(group.targets(&bindings, problems));
    }
    targets
}

/// Target tensors in the published layout: the logical tensors themselves, those that a rule of
/// the mapping names.
pub(in crate::plan) fn to_published(
    logical: LogicalTensors,
    mapping: &Resolved,
    named_by_layout: bool,
    leftovers: &mut Vec<Leftover>,
) -> Vec<Target> {
    let mut targets = Vec::with_capacity(logical.len());
    for (name, tensor) in logical {
        let taken = mapping.layouts().find_map(|layout| layout.take_hf(&name));
        let (grouped, dtype) = match taken {
            Some(Taken::Map { rule, .. }) => {
                (rule.grouped, rule.hf_dtype.filter(|_| named_by_layout))
            }
            Some(Taken::Drop { .. }) => (false, None),
            None if named_by_layout => (false, None),
            None => {
                leftovers.extend(tensor.parts.iter().map(|(m, _)| *m));
                continue;
            }
        };
        let fragments = fragments_of(tensor.parts);
        let (shape, expert_axis) = (tensor.shape, false);
        targets.push(Target { name, shape, fragments, grouped, expert_axis, dtype });
    }
    targets
}

/// Whether a tensor of the rule has no more pieces than any model's; notes it where it has.
pub(super) fn has_few_pieces(rule: &Rule, tensor: &str, problems: &mut Problems) -> bool {
    let count = rule.piece_count();
    if count > MOST_PIECES {
        let what = format!("expected at most {MOST_PIECES}, got {count}");
        problems.explain(Problem::TooManyPieces, tensor, what);
    }
    count <= MOST_PIECES
}

/// The first of these shapes without elements, where the rule's operations move elements.
///
/// What has no elements has no bytes that bound its extents, and a config.json can ask for any
/// number of parts.
pub(super) fn empty_part<S: AsRef<[u64]>>(rule: &Rule, shapes: &[S]) -> Option<usize> {
    if rule.ops.is_empty() {
        return None;
    }
    shapes.iter().position(|s| s.as_ref().contains(&0))
}

fn all_there<'w>(
    slots: &[Option<&'w Whole<'w>>],
    missing: impl Fn(usize) -> String,
    problems: &mut Problems,
) -> Option<Vec<&'w Whole<'w>>> {
    for j in (0..slots.len()).filter(|&j| slots[j].is_none()) {
        problems.add(Problem::MissingPart, &missing(j));
    }
    slots.iter().copied().collect()
}
