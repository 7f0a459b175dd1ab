//! Whether a checkpoint's logical tensors are all there: what a mapping requires of the model and of
//! each layer, and what a layer's siblings have.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;

use super::{DroppedCounts, LogicalTensors, assemble};
use crate::mapping::{
    Layout, NameTemplate, RequiredName, Requirement, ResolvedMapping, RuleMatch, Scope, TableRow,
};
use crate::plan::options::matches;
use crate::plan::report::{Problem, Problems};

/// Missing layers that are looked at one by one: a name or a config.json can ask for any number.
const MAX_LAYERS_EXAMINED: usize = 1 << 12;

/// The tensors of a layer by their names within it, layer by layer.
type LayerNames<'n> = BTreeMap<u64, BTreeSet<&'n str>>;

/// Looks for what is missing from a checkpoint.
pub(in crate::plan) struct Completeness<'a> {
    /// The checkpoint's tensors.
    pub logical: &'a LogicalTensors,
    /// What they should be.
    pub mapping: &'a ResolvedMapping,
    /// The layout of the checkpoint, `None` where that is the published one.
    pub source: Option<&'a Layout>,
    /// The layout of the view, likewise.
    pub view: Option<&'a Layout>,
    /// Names that may be missing.
    pub allowed: &'a [Regex],
    /// What is missing and may be, in the order in which it was found.
    pub allowed_missing: Vec<String>,
    /// LayerNames that config.json names and that a checkpoint may lack, as this one does.
    pub absent_layers: BTreeSet<String>,
}

impl Completeness<'_> {
    /// Notes layers and tensors that are missing; parts of the target's own rules were noted when it
    /// was assembled.
    ///
    /// What a mapping requires is looked at only where there are no has_unmapped: they may be the
    /// missing ones under other names.
    pub(in crate::plan) fn check(&mut self, has_unmapped: bool, problems: &mut Problems) {
        let layout = self.view.or(self.source).or_else(|| self.mapping.layouts().next());
        let Some(layout) = layout else { return };
        self.layers(layout, has_unmapped, problems);
        if self.view.is_none() {
            // Only what it refuses is of interest.
            let (mut dropped, mut leftovers) = (DroppedCounts::new(), Vec::new());
            assemble::to_layout(self.logical, layout, &mut dropped, &mut leftovers, problems);
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
        self.note_absent(&scopes);
        let layers = |scope: &Scope| {
            let found = scopes.iter().find(|(known, _)| *known == scope);
            &found.expect("every scope was looked at").1
        };
        let whole = BTreeMap::from([(0, logical.keys().map(String::as_str).collect())]);
        for requirement in &mapping.requirements {
            let layers = requirement.scope.as_ref().map_or(&whole, layers);
            self.required(requirement, layers, problems);
        }
        for siblings in &mapping.siblings {
            self.siblings(&siblings.scope, layers(&siblings.scope), &siblings.may_lack, problems);
        }
    }

    /// Notes layers that a checkpoint may lack, and lacks although config.json names them.
    fn note_absent(&mut self, scopes: &[(&Scope, LayerNames<'_>)]) {
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

    /// Notes layers that have no tensor at all.
    ///
    /// A layer is a value of an index that the config bounds without a default: layers that a
    /// checkpoint may lack, such as those of multi-token prediction, have one.
    fn layers(&mut self, layout: &Layout, has_unmapped: bool, problems: &mut Problems) {
        let mut seen: BTreeMap<String, (&NameTemplate, u64, BTreeSet<u64>)> = BTreeMap::new();
        // The checkpoint's own names are what its owner can look for.
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
            let there = u64::try_from(layers.len()).expect("tensors are counted in 32 bits");
            let missing = (0..count).filter(|l| !layers.contains(l));
            let names = missing.filter_map(|l| template.prefix_through_index(l));
            self.missing_layers(count - there, names, &what, problems);
        }
    }

    /// Notes `count` layers that are missing, but for those that may be or were noted already.
    fn missing_layers(
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

    fn required(
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
            // Where some experts are there, the rule that groups them misses the others.
            let some_experts = set.iter().any(|name| name.is_indexed() && has(name));
            let is_said = |name: &RequiredName| has(name) || name.is_indexed() && some_experts;
            for name in set.iter().filter(|name| !is_said(name)) {
                let names = name.names().map(|n| scope.map_or(n.clone(), |s| s.join(*layer, &n)));
                self.missing(name.count(), names, problems, || match scope {
                    None => "of the model".to_owned(),
                    Some(_) => "of its layer".to_owned(),
                });
            }
        }
    }

    /// Notes what a layer lacks and another of its kind has, and layers between others.
    fn siblings(
        &mut self,
        scope: &Scope,
        layers: &LayerNames<'_>,
        may_lack: &[RequiredName],
        problems: &mut Problems,
    ) {
        let Some((&last, _)) = layers.last_key_value() else { return };
        let there = u64::try_from(layers.len()).expect("tensors are counted in 32 bits");
        let between = (0..last).filter(|l| !layers.contains_key(l)).map(|l| scope.layer(l));
        self.missing_layers((last + 1).saturating_sub(there), between, "others follow", problems);
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
            // Strangers are noted elsewhere, and where there is a choice it is one of the layer.
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
                    self.missing(1, names, problems, || format!("layer {first} has it"));
                }
            }
        }
    }

    /// Notes tensors that are missing, but for those that may be, that the view would not have, or
    /// that were refused already.
    fn missing(
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
        // The checkpoint's own names are what its owner can look for.
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

fn layers_of<'n>(logical: &'n LogicalTensors, scope: &Scope) -> LayerNames<'n> {
    let mut layers = LayerNames::new();
    for (layer, name) in logical.keys().filter_map(|name| scope.split(name)) {
        layers.entry(layer).or_default().insert(name);
    }
    layers
}

/// Whether a name has an index of its own: `experts.3.up_proj.weight`.
fn is_numbered(name: &str) -> bool {
    name.split('.').any(|part| part.bytes().all(|b| b.is_ascii_digit()))
}

/// Which of the sets a layer takes: the one of which it has most names; `None` where it has none.
fn set_index_in_use(requirement: &Requirement, there: &BTreeSet<&str>) -> Option<usize> {
    let count =
        |set: &Vec<RequiredName>| set.iter().filter(|name| name.is_in(there)).fold(0, |n, _| n + 1);
    let counts: Vec<u64> = requirement.one_of.iter().map(count).collect();
    let most = counts.iter().copied().max().filter(|n| *n > 0)?;
    counts.iter().position(|n| *n == most)
}

fn set_in_use<'r>(
    requirement: &'r Requirement,
    there: &BTreeSet<&str>,
) -> Option<&'r [RequiredName]> {
    set_index_in_use(requirement, there).map(|i| &*requirement.one_of[i])
}

/// The set that most layers take, the first where none takes any.
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
