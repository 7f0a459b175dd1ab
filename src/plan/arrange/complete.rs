//! Looks for missing tensors: whole layers, tensors that the mapping requires, and tensors that
//! other layers of the same kind have.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;

use super::{DroppedCounts, LogicalTensors, assemble};
use crate::mapping::{
    Layout, NameTemplate, RequiredName, Requirement, ResolvedMapping, RuleMatch, Scope, TableRow,
};
use crate::plan::options::matches;
use crate::plan::report::{Problem, Problems};
use crate::tensor::to_u64;

/// Maximum number of missing layers that are examined one by one. A config.json, or the number in a
/// tensor's name, can ask for any number of layers.
const MAX_LAYERS_EXAMINED: usize = 1 << 12;

/// For each layer, the names of its tensors, relative to the layer.
type LayerNames<'n> = BTreeMap<u64, BTreeSet<&'n str>>;

/// The search for missing tensors: what it needs, and what it found.
pub(in crate::plan) struct Completeness<'a> {
    /// The checkpoint's tensors.
    pub logical: &'a LogicalTensors,
    /// Has the requirements.
    pub mapping: &'a ResolvedMapping,
    /// The layout of the source; `None` for the published one.
    pub source: Option<&'a Layout>,
    /// The layout of the view; `None` for the published one.
    pub view: Option<&'a Layout>,
    /// Patterns of names that may be missing.
    pub allowed: &'a [Regex],
    /// Output: what is missing and matches one of these patterns, in the order of discovery.
    pub allowed_missing: Vec<String>,
    /// Output: optional layers that config.json names and the checkpoint does not have.
    pub absent_layers: BTreeSet<String>,
}

impl Completeness<'_> {
    /// Notes missing layers and tensors. Missing parts of the view's rules were already noted when
    /// its tensors were assembled.
    ///
    /// With `has_unmapped`, requirements are not checked: tensors that no rule names may be the
    /// missing ones under other names.
    pub(in crate::plan) fn check(&mut self, has_unmapped: bool, problems: &mut Problems) {
        let layout = self.view.or(self.source).or_else(|| self.mapping.layouts().next());
        let Some(layout) = layout else { return };
        self.check_layers(layout, has_unmapped, problems);
        if self.view.is_none() {
            // For its problems only: the parts that are missing.
            let (mut dropped, mut unmapped) = (DroppedCounts::new(), Vec::new());
            assemble::to_layout(self.logical, layout, &mut dropped, &mut unmapped, problems);
        }
        if has_unmapped {
            return;
        }
        let (mapping, logical) = (self.mapping, self.logical);
        let of_requirements = mapping.requirements.iter().filter_map(|r| r.scope.as_ref());
        let mut scopes: Vec<(&Scope, LayerNames<'_>)> = Vec::new();
        for scope in of_requirements.chain(mapping.siblings.iter().map(|s| &s.scope)) {
            if !scopes.iter().any(|(known, _)| *known == scope) {
                scopes.push((scope, layers_of(logical, scope)));
            }
        }
        self.note_absent_layers(&scopes);
        let layers = |scope: &Scope| {
            let found = scopes.iter().find(|(known, _)| *known == scope);
            &found.expect("every scope was looked at").1
        };
        let whole = BTreeMap::from([(0, logical.keys().map(String::as_str).collect())]);
        for requirement in &mapping.requirements {
            let layers = requirement.scope.as_ref().map_or(&whole, layers);
            self.check_requirement(requirement, layers, problems);
        }
        for siblings in &mapping.siblings {
            self.check_siblings(
                &siblings.scope,
                layers(&siblings.scope),
                &siblings.may_lack,
                problems,
            );
        }
    }

    /// Collects optional layers that config.json names and the checkpoint does not have.
    fn note_absent_layers(&mut self, scopes: &[(&Scope, LayerNames<'_>)]) {
        let absent_layers = |(scope, layers): &&(&Scope, LayerNames<'_>)| {
            scope.count().is_some_and(|n| n > 0) && layers.is_empty()
        };
        for (scope, _) in scopes.iter().filter(absent_layers) {
            let first = scope.join(0, "x");
            let dropped =
                |layout: &Layout| matches!(layout.match_hf(&first), Some(RuleMatch::Drop { .. }));
            if !self.view.is_some_and(dropped) {
                self.absent_layers.insert(scope.layer(0));
            }
        }
    }

    /// Notes layers without any tensor.
    ///
    /// Layers are counted by an index whose bound has no default. Optional layers, such as those of
    /// multi-token prediction, have a bound with a default.
    fn check_layers(&mut self, layout: &Layout, has_unmapped: bool, problems: &mut Problems) {
        let mut seen: BTreeMap<String, (&NameTemplate, u64, BTreeSet<u64>)> = BTreeMap::new();
        // Messages show names of the checkpoint, which the user can look up.
        let of_source = self.view.is_none() && self.source.is_some();
        for row in &layout.rows {
            let TableRow::Map(rule) = row else { continue };
            for template in &rule.hf {
                let shown = if of_source { &rule.to[0] } else { template };
                let index = template.first_index().filter(|v| rule.stack != Some(*v));
                let count = index.and_then(|v| rule.vars.required(v));
                if let (Some(count), Some(first)) = (count, template.prefix_through_index(0)) {
                    seen.entry(first).or_insert_with(|| (shown, count, BTreeSet::new()));
                }
            }
        }
        for name in self.logical.keys() {
            let taken = layout.match_hf(name);
            let Some(RuleMatch::Map { rule, part, bindings, .. }) = taken else { continue };
            let template = &rule.hf[part];
            let layer = template.first_index().and_then(|v| bindings.index(v));
            let layers = template.prefix_through_index(0).and_then(|first| seen.get_mut(&first));
            if let (Some(layer), Some((_, _, layers))) = (layer, layers) {
                layers.insert(layer);
            }
        }
        seen.retain(|_, (_, _, layers)| !(has_unmapped && layers.is_empty()));
        for (template, count, layers) in seen.into_values() {
            let what = if layers.is_empty() {
                format!("none is there, by config.json there are {count}")
            } else {
                format!("by config.json there are {count}")
            };
            let there = to_u64(layers.len());
            let missing = (0..count).filter(|l| !layers.contains(l));
            let names = missing.filter_map(|l| template.prefix_through_index(l));
            self.note_missing_layers(count - there, names, &what, problems);
        }
    }

    /// Notes `count` missing layers, except those that are allowed to be missing or noted already.
    fn note_missing_layers(
        &mut self,
        count: u64,
        names: impl Iterator<Item = String>,
        why: &str,
        problems: &mut Problems,
    ) {
        let mut reported = count;
        let mut named = Vec::new();
        for name in names.take(MAX_LAYERS_EXAMINED) {
            if problems.is_reported(&name) {
                reported -= 1;
                continue;
            }
            problems.mark_missing(&name);
            if matches(self.allowed, &format!("{name}.")) {
                self.allowed_missing.push(name);
                reported -= 1;
            } else {
                named.push((name, why.to_owned()));
            }
        }
        problems.add_many(Problem::MissingLayer, reported, named.into_iter());
    }

    /// Notes what a requirement names and a layer, or the model, lacks.
    fn check_requirement(
        &mut self,
        requirement: &Requirement,
        layers: &LayerNames<'_>,
        problems: &mut Problems,
    ) {
        let scope = requirement.scope.as_ref();
        let usual = most_common_set(requirement, layers);
        for (layer, there) in layers {
            let has = |name: &RequiredName| name.is_in(there);
            if requirement.beside.as_ref().is_some_and(|beside| !has(beside))
                || requirement.layers.as_ref().is_some_and(|layers| !layers.contains(layer))
            {
                continue;
            }
            let refused = |name: &RequiredName| {
                let full = |n: String| scope.map_or(n.clone(), |s| s.join(*layer, &n));
                name.names().next().is_some_and(|n| problems.is_reported(&full(n)))
            };
            let set = match set_in_use(requirement, there) {
                Some(set) => set,
                None if requirement.one_of.iter().flatten().any(refused) => continue,
                None => usual,
            };
            // If some experts are there, the rule that groups them reports the others.
            let some_experts = set.iter().any(|name| name.is_indexed() && has(name));
            let is_said = |name: &RequiredName| has(name) || name.is_indexed() && some_experts;
            for name in set.iter().filter(|name| !is_said(name)) {
                let names = name.names().map(|n| scope.map_or(n.clone(), |s| s.join(*layer, &n)));
                self.note_missing(name.count(), names, problems, || match scope {
                    None => "of the model".to_owned(),
                    Some(_) => "of its layer".to_owned(),
                });
            }
        }
    }

    /// Notes tensors that a layer lacks and another of its kind has, and gaps in the numbering.
    fn check_siblings(
        &mut self,
        scope: &Scope,
        layers: &LayerNames<'_>,
        may_lack: &[RequiredName],
        problems: &mut Problems,
    ) {
        let Some((&last, _)) = layers.last_key_value() else { return };
        let there = to_u64(layers.len());
        let between = (0..last).filter(|l| !layers.contains_key(l)).map(|l| scope.layer(l));
        self.note_missing_layers(
            (last + 1).saturating_sub(there),
            between,
            "others follow",
            problems,
        );
        let choices: Vec<&Requirement> = self
            .mapping
            .requirements
            .iter()
            .filter(|r| r.one_of.len() > 1 && r.scope.as_ref() == Some(scope))
            .collect();
        let mut kinds: BTreeMap<Vec<Option<usize>>, Vec<u64>> = BTreeMap::new();
        for (layer, there) in layers {
            let kind = choices.iter().map(|choice| set_index_in_use(choice, there)).collect();
            kinds.entry(kind).or_default().push(*layer);
        }
        for members in kinds.values() {
            // Each name with the first layer that has it.
            let mut known: BTreeMap<&str, u64> = BTreeMap::new();
            for layer in members {
                for name in layers[layer].iter().filter(|n| !is_numbered(n)) {
                    known.entry(name).or_insert(*layer);
                }
            }
            // Only names of a rule count, and no names of a choice: each layer has its own.
            let chosen = |name: &str| {
                choices.iter().flat_map(|c| c.one_of.iter().flatten()).any(|m| m.matches(name))
            };
            known.retain(|name, first| {
                let whole = scope.join(*first, name);
                !may_lack.iter().any(|m| m.matches(name))
                    && !chosen(name)
                    && self.mapping.layouts().any(|l| l.match_hf(&whole).is_some())
            });
            for layer in members {
                for (name, first) in known.iter().filter(|(n, _)| !layers[layer].contains(*n)) {
                    let names = std::iter::once(scope.join(*layer, name));
                    self.note_missing(1, names, problems, || format!("layer {first} has it"));
                }
            }
        }
    }

    /// Notes missing tensors, except those that are allowed to be missing, that the view drops, or
    /// that were reported already.
    fn note_missing(
        &mut self,
        count: u64,
        names: impl Iterator<Item = String>,
        problems: &mut Problems,
        why: impl Fn() -> String,
    ) {
        let mut names = names.peekable();
        let Some(first) = names.peek().cloned() else { return };
        let layout = self.view.or(self.source).or_else(|| self.mapping.layouts().next());
        let dropped = |l: &Layout| matches!(l.match_hf(&first), Some(RuleMatch::Drop { .. }));
        if self.view.is_some_and(dropped) {
            return;
        }
        // Messages show names of the checkpoint, which the user can look up.
        let own = self.source.and_then(|layout| layout.name_of(&first));
        let in_layout = layout.and_then(|layout| layout.name_of(&first));
        let names_of_it = [Some(&first), own.as_ref(), in_layout.as_ref()];
        if names_of_it.into_iter().flatten().any(|name| problems.is_reported(name)) {
            return;
        }
        problems.mark_missing(own.as_ref().unwrap_or(&first));
        let allowed = |name: &String| matches(self.allowed, name);
        let is_allowed = allowed(&first) || own.as_ref().is_some_and(allowed);
        // Experts of a grouped layout are one tensor.
        let count = if own.is_some() { 1 } else { count };
        let shown = own.unwrap_or(first);
        match (is_allowed, count) {
            (true, 1) => self.allowed_missing.push(shown),
            (true, _) => self.allowed_missing.push(format!("{shown} and {} more", count - 1)),
            (false, 1) => problems.explain(Problem::Incomplete, &shown, why()),
            (false, _) => {
                problems.add_many(Problem::Incomplete, count, names.map(|name| (name, why())));
            }
        }
    }
}

/// The layers of a scope that have any tensor.
fn layers_of<'n>(logical: &'n LogicalTensors, scope: &Scope) -> LayerNames<'n> {
    let mut layers = LayerNames::new();
    for (layer, name) in logical.keys().filter_map(|name| scope.split(name)) {
        layers.entry(layer).or_default().insert(name);
    }
    layers
}

/// Whether a name within a layer has a number of its own: `experts.3.up_proj.weight`.
fn is_numbered(name: &str) -> bool {
    name.split('.').any(|part| part.bytes().all(|b| b.is_ascii_digit()))
}

/// Position of the list in `one_of` that a layer has the most names of; `None` where it has none.
fn set_index_in_use(requirement: &Requirement, there: &BTreeSet<&str>) -> Option<usize> {
    let count =
        |set: &Vec<RequiredName>| set.iter().filter(|name| name.is_in(there)).fold(0, |n, _| n + 1);
    let counts: Vec<u64> = requirement.one_of.iter().map(count).collect();
    let most = counts.iter().copied().max().filter(|n| *n > 0)?;
    counts.iter().position(|n| *n == most)
}

/// The list in `one_of` that a layer has the most names of.
fn set_in_use<'r>(
    requirement: &'r Requirement,
    there: &BTreeSet<&str>,
) -> Option<&'r [RequiredName]> {
    set_index_in_use(requirement, there).map(|i| &*requirement.one_of[i])
}

/// The list that most layers have; the first where no layer has any.
fn most_common_set<'r>(
    requirement: &'r Requirement,
    layers: &LayerNames<'_>,
) -> &'r [RequiredName] {
    let mut counts = vec![0u64; requirement.one_of.len()];
    for there in layers.values() {
        if let Some(i) = set_index_in_use(requirement, there) {
            counts[i] += 1;
        }
    }
    let most = (0..counts.len()).rev().max_by_key(|i| counts[*i]).unwrap_or(0);
    requirement.one_of.get(most).map_or(&[], Vec::as_slice)
}
