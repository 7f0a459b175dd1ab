//! The two maps of a conversion: from the source's layout to logical tensors, and from logical
//! tensors to the view's layout. Both are boxes with affine maps, and composing them gives the
//! fragments.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};

use super::group::{self, RuleGroup, RuleGroups};
use super::{DroppedCounts, LogicalTensor, LogicalTensors, ViewTensor};
use crate::mapping::{AssembledTensor, Bindings, Layout, ResolvedMapping, Rule, RuleMatch};
use crate::plan::fragment::{MAX_FRAGMENTS, fragments_of};
use crate::plan::gather::WholeTensor;
use crate::plan::report::{Problem, Problems};
use crate::plan::{Matrix, MatrixId};

/// Logical tensors of a source in the published layout: its tensors under their canonical names.
pub(in crate::plan) fn from_published(
    whole_tensors: &[WholeTensor<'_>],
    mapping: &ResolvedMapping,
    problems: &mut Problems,
) -> LogicalTensors {
    let mut logical = LogicalTensors::new();
    for whole in whole_tensors {
        let name = mapping.canonical(whole.name).unwrap_or_else(|| whole.name.to_owned());
        match logical.entry(name) {
            Entry::Vacant(entry) => {
                entry.insert(LogicalTensor {
                    shape: whole.shape.clone(),
                    parts: whole.parts.clone(),
                });
            }
            Entry::Occupied(entry) => {
                let first = entry.get().parts[0].0;
                let first = whole_tensors.iter().find(|w| w.parts.iter().any(|(m, _)| *m == first));
                let first = first.map_or(whole.payload_name, |w| w.payload_name);
                let what = format!("`{first}` and `{}`", whole.payload_name);
                problems.explain(Problem::SameName, entry.key(), what);
            }
        }
    }
    logical
}

/// Logical tensors of a source in another layout: its rules applied backwards.
///
/// Where a tensor can have several published names, the one in `original` is used if there is one,
/// and the usual one otherwise.
pub(in crate::plan) fn from_layout(
    whole_tensors: &[WholeTensor<'_>],
    layout: &Layout,
    original: Option<&[Matrix]>,
    dropped: &mut DroppedCounts,
    unmapped: &mut Vec<MatrixId>,
    problems: &mut Problems,
) -> LogicalTensors {
    type Slots<'w> = Vec<Option<&'w WholeTensor<'w>>>;
    let mut groups: BTreeMap<(usize, Bindings), (&Rule, Slots<'_>)> = BTreeMap::new();
    let published: HashSet<&str> = original.into_iter().flatten().map(|m| &*m.name).collect();
    for whole in whole_tensors {
        match layout.match_to_as_published(whole.name, |name| published.contains(name)) {
            Some(RuleMatch::Map { row, rule, part, bindings }) => {
                let slots = groups
                    .entry((row, bindings))
                    .or_insert_with(|| (rule, vec![None; rule.to.len()]));
                slots.1[part] = Some(whole);
            }
            Some(RuleMatch::Drop { reason }) => *dropped.entry(reason.to_owned()).or_default() += 1,
            None => unmapped.extend(whole.parts.iter().map(|(m, _)| *m)),
        }
    }
    let mut logical: BTreeMap<String, (LogicalTensor, &str)> = BTreeMap::new();
    for ((_, bindings), (rule, slots)) in groups {
        let name = |j: usize| rule.to[j].format(&bindings, &rule.vars).unwrap_or_default();
        let Some(sources) = all_present(&slots, name, problems) else { continue };
        let Some((shape, tensors)) = disassemble(rule, &sources, problems) else {
            problems.mark_refused(name(0));
            continue;
        };
        let mut parts: BTreeMap<String, LogicalTensor> = BTreeMap::new();
        for (tensor, whole) in tensors.into_iter().zip(&sources) {
            for fragment in tensor.fragments {
                let Some(name) = rule.part_name(fragment.part, fragment.stacked, &bindings) else {
                    continue;
                };
                let empty = || LogicalTensor { shape: shape.clone(), parts: Vec::new() };
                let from_whole = fragment.map.inverse();
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

/// Applies a rule backwards: the shape of its parts, and for each layout tensor the boxes of parts
/// that it consists of. `None` where the shapes do not fit, which is noted.
fn disassemble(
    rule: &Rule,
    sources: &[&WholeTensor<'_>],
    problems: &mut Problems,
) -> Option<(Vec<u64>, Vec<AssembledTensor>)> {
    let shapes: Vec<Vec<u64>> = sources.iter().map(|w| w.shape.clone()).collect();
    let refuse = |problems: &mut Problems, j: usize, what: String| {
        problems.explain(Problem::RuleShape, sources[j].name, what);
        None
    };
    if let Some(j) = first_empty(rule, &shapes) {
        return refuse(problems, j, format!("expected elements, got {:?}", shapes[j]));
    }
    let shape = match rule.part_shape(&shapes) {
        Ok(shape) => shape,
        Err(error) => return refuse(problems, 0, error.to_string()),
    };
    if !has_allowed_fragment_count(rule, sources[0].name, problems) {
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

/// Tensors of a view in a layout other than the published one, assembled from logical tensors.
pub(in crate::plan) fn to_layout(
    logical: &LogicalTensors,
    layout: &Layout,
    dropped: &mut DroppedCounts,
    unmapped: &mut Vec<MatrixId>,
    problems: &mut Problems,
) -> Vec<ViewTensor> {
    let mut groups = RuleGroups::new();
    for (name, tensor) in logical {
        match layout.match_hf(name) {
            Some(RuleMatch::Map { row, rule, part, bindings }) => {
                let stacked = rule.stack.and_then(|var| bindings.index(var));
                let key = match rule.stack {
                    Some(var) => bindings.with(var, None),
                    None => bindings,
                };
                let group = groups.entry((row, key)).or_insert_with(|| RuleGroup::new(rule));
                group.parts.insert((part, stacked), tensor);
            }
            Some(RuleMatch::Drop { reason }) => *dropped.entry(reason.to_owned()).or_default() += 1,
            None => unmapped.extend(tensor.parts.iter().map(|(m, _)| *m)),
        }
    }
    group::add_missing_groups(&mut groups, layout);
    let mut view_tensors = Vec::new();
    for ((_, bindings), group) in groups {
        view_tensors.extend(group.tensors(&bindings, problems));
    }
    view_tensors
}

/// Tensors of a view in the published layout: the logical tensors that a rule of the mapping names.
pub(in crate::plan) fn to_published(
    logical: LogicalTensors,
    mapping: &ResolvedMapping,
    named_by_layout: bool,
    unmapped: &mut Vec<MatrixId>,
) -> Vec<ViewTensor> {
    let mut view_tensors = Vec::with_capacity(logical.len());
    for (name, tensor) in logical {
        let taken = mapping.layouts().find_map(|layout| layout.match_hf(&name));
        let (grouped, dtype) = match taken {
            Some(RuleMatch::Map { rule, .. }) => {
                (rule.grouped, rule.hf_dtype.filter(|_| named_by_layout))
            }
            Some(RuleMatch::Drop { .. }) => (false, None),
            None if named_by_layout => (false, None),
            None => {
                unmapped.extend(tensor.parts.iter().map(|(m, _)| *m));
                continue;
            }
        };
        let fragments = fragments_of(tensor.parts);
        let (shape, expert_axis) = (tensor.shape, false);
        view_tensors.push(ViewTensor { name, shape, fragments, grouped, expert_axis, dtype });
    }
    view_tensors
}

/// Whether a tensor of the rule has at most [`MAX_FRAGMENTS`] fragments; notes it where it has
/// more.
pub(super) fn has_allowed_fragment_count(
    rule: &Rule,
    tensor: &str,
    problems: &mut Problems,
) -> bool {
    let count = rule.fragment_count();
    if count > MAX_FRAGMENTS {
        let what = format!("expected at most {MAX_FRAGMENTS}, got {count}");
        problems.explain(Problem::TooManyFragments, tensor, what);
    }
    count <= MAX_FRAGMENTS
}

/// Position of the first shape without elements, for a rule with operations.
///
/// Such a tensor has no bytes that would bound its other extents, and a config.json can ask for any
/// number of parts of it.
pub(super) fn first_empty<S: AsRef<[u64]>>(rule: &Rule, shapes: &[S]) -> Option<usize> {
    if rule.ops.is_empty() {
        return None;
    }
    shapes.iter().position(|s| s.as_ref().contains(&0))
}

/// The tensors of all names of a rule; `None` where some are missing, which is noted.
fn all_present<'w>(
    slots: &[Option<&'w WholeTensor<'w>>],
    missing: impl Fn(usize) -> String,
    problems: &mut Problems,
) -> Option<Vec<&'w WholeTensor<'w>>> {
    for j in (0..slots.len()).filter(|&j| slots[j].is_none()) {
        problems.add(Problem::MissingPart, &missing(j));
    }
    slots.iter().copied().collect()
}
