//! From the matrices of a source layout to the tensors of a target layout, through the
//! checkpoint's logical tensors: two affine maps, composed.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::matrix::Matrix;
use super::problems::{Problem, Problems};
use super::{Fragment, MatrixId};
use crate::mapping::{Bindings, Layout, Resolved, Rule, Taken};
use crate::tensor::{BoxMap, coalesce};

/// A tensor of the checkpoint's own naming, wherever its elements are.
#[derive(Debug)]
pub struct Logical {
    pub shape: Vec<u64>,
    /// Target: the logical tensor. Source: the matrix.
    pub parts: Vec<(MatrixId, BoxMap)>,
}

/// A tensor of the view before its dtype is known.
#[derive(Debug)]
pub struct Target {
    pub name: String,
    pub shape: Vec<u64>,
    pub fragments: Vec<Fragment>,
    /// Whether it holds expert weights, which always have the output dtype.
    pub grouped: bool,
    /// Whether its first axis counts experts.
    pub expert_axis: bool,
}

/// Counts of what is left out, by reason.
pub type Dropped = BTreeMap<String, u64>;

/// The checkpoint's logical tensors by name.
pub type LogicalTensors = BTreeMap<String, Logical>;

/// A source matrix that no rule takes, for the user to decide on.
pub type Leftover = MatrixId;

fn id(i: usize) -> MatrixId {
    MatrixId(u32::try_from(i).expect("the source numbers its tensors with 32 bits"))
}

/// Logical tensors of a source that is in the published layout.
pub fn from_published(
    matrices: &[Matrix],
    mapping: &Resolved,
    problems: &mut Problems,
) -> LogicalTensors {
    let mut logical = LogicalTensors::new();
    for (i, matrix) in matrices.iter().enumerate() {
        let name = mapping.canonical(&matrix.name).unwrap_or_else(|| matrix.name.to_string());
        let shape = matrix.logical_dims();
        let parts = vec![(id(i), matrix.logical_map())];
        match logical.entry(name) {
            Entry::Vacant(entry) => {
                entry.insert(Logical { shape, parts });
            }
            Entry::Occupied(entry) => problems.add(Problem::SameName, entry.key()),
        }
    }
    logical
}

/// Logical tensors of a source that is in a grouped layout: its tensors taken apart.
pub fn from_layout(
    matrices: &[Matrix],
    layout: &Layout,
    dropped: &mut Dropped,
    leftovers: &mut Vec<Leftover>,
    problems: &mut Problems,
) -> LogicalTensors {
    type Slots = Vec<Option<MatrixId>>;
    let mut groups: BTreeMap<(usize, Bindings), (&Rule, Slots)> = BTreeMap::new();
    for (i, matrix) in matrices.iter().enumerate() {
        match layout.take_to(&matrix.name) {
            Some(Taken::Map { row, rule, part, bindings }) => {
                let slots = groups
                    .entry((row, bindings))
                    .or_insert_with(|| (rule, vec![None; rule.to.len()]));
                slots.1[part] = Some(id(i));
            }
            Some(Taken::Drop { reason }) => *dropped.entry(reason.to_owned()).or_default() += 1,
            None => leftovers.push(id(i)),
        }
    }
    let mut logical = LogicalTensors::new();
    for ((_, bindings), (rule, slots)) in groups {
        let missing = |j: usize| rule.to[j].format(&bindings, &rule.vars).unwrap_or_default();
        let Some(ids) = all_there(&slots, missing, problems) else { continue };
        let shapes: Vec<Vec<u64>> =
            ids.iter().map(|m| matrices[m.index()].logical_dims()).collect();
        let name_of = |m: MatrixId| &matrices[m.index()].name;
        let assembled = rule.part_shape(&shapes).and_then(|shape| {
            let tensors = rule.assemble(&vec![shape.clone(); rule.hf.len()])?;
            Ok((shape, tensors))
        });
        let (shape, tensors) = match assembled {
            Ok(assembled) => assembled,
            Err(error) => {
                problems.explain(Problem::RuleShape, name_of(ids[0]), error);
                continue;
            }
        };
        if let Some(j) = (0..ids.len()).find(|&j| tensors[j].shape != shapes[j]) {
            let what = format!("expected {:?}, got {:?}", tensors[j].shape, shapes[j]);
            problems.explain(Problem::RuleShape, name_of(ids[j]), what);
            continue;
        }
        for (tensor, m) in tensors.into_iter().zip(&ids) {
            let of_matrix = matrices[m.index()].logical_map();
            for piece in tensor.pieces {
                let Some(name) = rule.part_name(piece.part, piece.stacked, &bindings) else {
                    continue;
                };
                let entry = logical
                    .entry(name)
                    .or_insert_with(|| Logical { shape: shape.clone(), parts: Vec::new() });
                entry.parts.extend(piece.map.inverse().after(&of_matrix).map(|map| (*m, map)));
            }
        }
    }
    refuse_doubled(&logical, problems);
    logical
}

/// Names that more elements land on than their shape has.
fn refuse_doubled(logical: &LogicalTensors, problems: &mut Problems) {
    for (name, tensor) in logical {
        let given: u64 = tensor.parts.iter().map(|(_, m)| m.elements()).sum();
        if given != tensor.shape.iter().product::<u64>() {
            problems.add(Problem::SameName, name);
        }
    }
}

/// Target tensors of a grouped layout, assembled from logical tensors.
pub fn to_layout(
    logical: &LogicalTensors,
    layout: &Layout,
    dropped: &mut Dropped,
    leftovers: &mut Vec<Leftover>,
    problems: &mut Problems,
) -> Vec<Target> {
    type Slots<'a> = BTreeMap<(usize, Option<u64>), &'a Logical>;
    let mut groups: BTreeMap<(usize, Bindings), (&Rule, Slots<'_>)> = BTreeMap::new();
    for (name, tensor) in logical {
        match layout.take_hf(name) {
            Some(Taken::Map { row, rule, part, bindings }) => {
                let stacked = rule.stack.and_then(|var| bindings.index(var));
                let key = match rule.stack {
                    Some(var) => bindings.with(var, None),
                    None => bindings,
                };
                let group = groups.entry((row, key)).or_insert_with(|| (rule, Slots::new()));
                group.1.insert((part, stacked), tensor);
            }
            Some(Taken::Drop { reason }) => *dropped.entry(reason.to_owned()).or_default() += 1,
            None => leftovers.extend(tensor.parts.iter().map(|(m, _)| *m)),
        }
    }
    let mut targets = Vec::new();
    for ((_, bindings), (rule, slots)) in groups {
        targets.extend(group_targets(rule, &bindings, &slots, problems));
    }
    targets
}

/// The layout's tensors of one rule and one binding of its variables.
fn group_targets(
    rule: &Rule,
    bindings: &Bindings,
    slots: &BTreeMap<(usize, Option<u64>), &Logical>,
    problems: &mut Problems,
) -> Vec<Target> {
    let target_name = |j: usize| rule.to[j].format(bindings, &rule.vars).unwrap_or_default();
    let mut complete = true;
    let mut shapes: Vec<Option<&Vec<u64>>> = vec![None; rule.hf.len()];
    for (part, shape) in shapes.iter_mut().enumerate() {
        for stacked in rule.stacked() {
            let part_name = || rule.part_name(part, stacked, bindings).unwrap_or_default();
            let Some(tensor) = slots.get(&(part, stacked)) else {
                problems.explain(
                    Problem::MissingPart,
                    &part_name(),
                    format!("for `{}`", target_name(0)),
                );
                complete = false;
                continue;
            };
            let first = *shape.get_or_insert(&tensor.shape);
            if !rule.fits_part(&tensor.shape) {
                let what = format!("expected {:?}, got {:?}", rule.hf_shape, tensor.shape);
                problems.explain(Problem::RuleShape, &part_name(), what);
                complete = false;
            } else if *first != tensor.shape {
                let what = format!("expected {first:?} as the others, got {:?}", tensor.shape);
                problems.explain(Problem::RuleShape, &part_name(), what);
                complete = false;
            }
        }
    }
    let shapes: Option<Vec<Vec<u64>>> =
        shapes.into_iter().map(Option::<&Vec<u64>>::cloned).collect();
    let Some(shapes) = shapes.filter(|_| complete) else { return Vec::new() };
    let assembled = match rule.assemble(&shapes) {
        Ok(assembled) => assembled,
        Err(error) => {
            problems.explain(Problem::RuleShape, &target_name(0), error);
            return Vec::new();
        }
    };
    let target = |(j, tensor): (usize, crate::mapping::Assembled)| {
        let fragments = tensor
            .pieces
            .iter()
            .flat_map(|piece| {
                let parts = slots.get(&(piece.part, piece.stacked)).map_or(&[][..], |t| &t.parts);
                parts.iter().filter_map(|(m, map)| Some((*m, piece.map.after(map)?)))
            })
            .collect();
        Target {
            name: target_name(j),
            expert_axis: rule.expert_axis && !tensor.shape.is_empty(),
            shape: tensor.shape,
            fragments: fragments_of(fragments),
            grouped: rule.grouped,
        }
    };
    assembled.into_iter().enumerate().map(target).collect()
}

/// Target tensors in the published layout: the logical tensors themselves, those that a rule of
/// the mapping names.
pub fn to_published(
    logical: LogicalTensors,
    mapping: &Resolved,
    named_by_layout: bool,
    leftovers: &mut Vec<Leftover>,
) -> Vec<Target> {
    let mut targets = Vec::with_capacity(logical.len());
    for (name, tensor) in logical {
        let taken = mapping.layouts().find_map(|layout| layout.take_hf(&name));
        let grouped = match taken {
            Some(Taken::Map { rule, .. }) => rule.grouped,
            Some(Taken::Drop { .. }) => false,
            None if named_by_layout => false,
            None => {
                leftovers.extend(tensor.parts.iter().map(|(m, _)| *m));
                continue;
            }
        };
        let fragments = fragments_of(tensor.parts);
        targets.push(Target { name, shape: tensor.shape, fragments, grouped, expert_axis: false });
    }
    targets
}

fn fragments_of(parts: Vec<(MatrixId, BoxMap)>) -> Vec<Fragment> {
    coalesce(parts).into_iter().map(|(matrix, map)| Fragment { map, matrix }).collect()
}

fn all_there(
    slots: &[Option<MatrixId>],
    missing: impl Fn(usize) -> String,
    problems: &mut Problems,
) -> Option<Vec<MatrixId>> {
    for j in (0..slots.len()).filter(|&j| slots[j].is_none()) {
        problems.add(Problem::MissingPart, &missing(j));
    }
    slots.iter().copied().collect()
}
