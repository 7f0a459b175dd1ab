//! The logical tensors that one rule joins, and the view tensors that it assembles from them.

use std::collections::{BTreeMap, BTreeSet};

use super::assemble::{first_empty, has_allowed_fragment_count};
use super::{LogicalTensor, ViewTensor};
use crate::mapping::{AssembledTensor, Bindings, Layout, Rule, Side, TableRow};
use crate::plan::fragment::fragments_of;
use crate::plan::report::{Problem, Problems};
use crate::tensor::to_u64;

/// Maximum number of missing parts that are examined one by one. A config.json can ask for any
/// number of experts.
const MAX_MISSING_EXAMINED: usize = 1 << 16;

/// Groups by the position of their rule and the values of its variables, without the stacked one.
pub(super) type RuleGroups<'a> = BTreeMap<(usize, Bindings), RuleGroup<'a>>;

/// The parts of a rule for one set of values of its variables, for example the experts of layer 3.
#[derive(Debug)]
pub(super) struct RuleGroup<'a> {
    rule: &'a Rule,
    /// By position in the rule's `hf` names and value of the stacked variable.
    pub parts: BTreeMap<(usize, Option<u64>), &'a LogicalTensor>,
}

impl<'a> RuleGroup<'a> {
    /// A group without parts.
    pub(super) fn new(rule: &'a Rule) -> RuleGroup<'a> {
        RuleGroup { rule, parts: BTreeMap::new() }
    }

    /// The view tensors of the group; none where it was refused, which is noted.
    pub(super) fn tensors(&self, bindings: &Bindings, problems: &mut Problems) -> Vec<ViewTensor> {
        let rule = self.rule;
        let tensor_name = |j: usize| rule.to[j].format(bindings, &rule.vars).unwrap_or_default();
        if !self.is_complete(bindings, &tensor_name(0), problems) {
            return Vec::new();
        }
        let Some(shapes) = self.shapes(bindings, problems) else { return Vec::new() };
        if !has_allowed_fragment_count(rule, &tensor_name(0), problems) {
            return Vec::new();
        }
        let assembled = match rule.assemble(&shapes) {
            Ok(assembled) => assembled,
            Err(error) => {
                problems.explain(Problem::RuleShape, &tensor_name(0), error);
                return Vec::new();
            }
        };
        let view_tensor = |(j, tensor)| self.tensor(tensor_name(j), tensor);
        assembled.into_iter().enumerate().map(view_tensor).collect()
    }

    fn tensor(&self, name: String, tensor: AssembledTensor) -> ViewTensor {
        let fragments = tensor
            .fragments
            .iter()
            .flat_map(|fragment| {
                let part = self.parts.get(&(fragment.part, fragment.stacked));
                let parts = part.map_or(&[][..], |t| &t.parts);
                parts.iter().filter_map(|(m, map)| Some((*m, fragment.map.after(map)?)))
            })
            .collect();
        ViewTensor {
            name,
            expert_axis: self.rule.expert_axis && !tensor.shape.is_empty(),
            shape: tensor.shape,
            fragments: fragments_of(fragments),
            grouped: self.rule.grouped,
            dtype: None,
        }
    }

    /// Whether every part is there; notes those that are not.
    fn is_complete(&self, bindings: &Bindings, view_name: &str, problems: &mut Problems) -> bool {
        let rule = self.rule;
        let parts = to_u64(rule.hf.len());
        let expected = parts.saturating_mul(rule.stacked_count());
        let there = to_u64(self.parts.len());
        if expected == there {
            return true;
        }
        if problems.is_refused(view_name) {
            return false;
        }
        problems.mark_missing(view_name);
        let all = rule.stacked().flat_map(|s| (0..rule.hf.len()).map(move |part| (part, s)));
        let missing = || all.clone().filter(|key| !self.parts.contains_key(key));
        let name = |(part, s): (usize, Option<u64>)| rule.part_name(part, s, bindings);
        let known = missing().take(MAX_MISSING_EXAMINED).filter_map(name);
        let refused: BTreeSet<String> = known.filter(|n| problems.is_refused(n)).collect();
        let refused_count = to_u64(refused.len());
        let names = missing().filter_map(name).filter(|n| !refused.contains(n));
        let first = names.map(|name| (name, format!("for `{view_name}`")));
        problems.add_many(Problem::MissingPart, expected - there - refused_count, first);
        false
    }

    /// The shape of each part, the same for all values of the stacked variable; `None` where shapes
    /// differ, which is noted.
    fn shapes(&self, bindings: &Bindings, problems: &mut Problems) -> Option<Vec<Vec<u64>>> {
        let rule = self.rule;
        let usual: Vec<&[u64]> =
            (0..rule.hf.len()).map(|part| self.most_common_shape(part)).collect();
        let mut fit = true;
        for ((part, stacked), tensor) in &self.parts {
            let got = &tensor.shape;
            let what = if let Some(expected) = rule.hf_shape.as_ref().filter(|e| *e != got) {
                format!("expected {expected:?}, got {got:?}")
            } else if got != usual[*part] {
                format!("expected {:?} as the others, got {got:?}", usual[*part])
            } else if first_empty(rule, &[got]).is_some() {
                format!("expected elements, got {got:?}")
            } else {
                continue;
            };
            let name = rule.part_name(*part, *stacked, bindings).unwrap_or_default();
            problems.explain(Problem::RuleShape, &name, what);
            fit = false;
        }
        fit.then(|| usual.into_iter().map(<[u64]>::to_vec).collect())
    }

    /// The shape that most tensors of a part have, so that the message names the odd ones.
    fn most_common_shape(&self, part: usize) -> &[u64] {
        let mut counts: BTreeMap<&[u64], usize> = BTreeMap::new();
        for (_, tensor) in self.parts.iter().filter(|((p, _), _)| *p == part) {
            *counts.entry(&tensor.shape).or_default() += 1;
        }
        counts.into_iter().max_by_key(|(_, n)| *n).map(|(s, _)| s).unwrap_or_default()
    }
}

/// Adds groups of which no part is there but must be, so that their parts are reported as missing.
///
/// Grouped tensors of one module belong together: a layer with `experts.gate_and_up_projs` must
/// also have `experts.down_projs`.
pub(super) fn add_missing_groups<'a>(groups: &mut RuleGroups<'a>, layout: &'a Layout) {
    let name = |rule: &Rule, bindings: &Bindings| rule.to[0].format(bindings, &rule.vars);
    let there = groups.iter().filter(|(_, group)| group.rule.grouped);
    let there: Vec<(Bindings, Option<String>, Option<Side>)> =
        there.map(|((_, b), g)| (b.clone(), name(g.rule, b), g.rule.reads)).collect();
    let mut provided: BTreeSet<String> = there.iter().filter_map(|(_, n, _)| n.clone()).collect();
    for (bindings, view_name, reads) in there {
        let Some((module, _)) = view_name.as_deref().and_then(|n| n.rsplit_once('.')) else {
            continue;
        };
        for (row, line) in layout.rows.iter().enumerate() {
            let TableRow::Map(rule) = line else { continue };
            let sibling = name(rule, &bindings)
                .filter(|n| rule.grouped && rule.reads == reads && !provided.contains(n));
            let Some(sibling) = sibling else { continue };
            if sibling.rsplit_once('.').is_some_and(|(m, _)| m == module) {
                provided.insert(sibling);
                groups.insert((row, bindings.clone()), RuleGroup::new(rule));
            }
        }
    }
}
