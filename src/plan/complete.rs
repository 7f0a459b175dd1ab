//! Whether a checkpoint's logical tensors are all there, as far as a mapping and its config say.

use std::collections::{BTreeMap, BTreeSet};

use super::assemble::{self, Dropped, LogicalTensors};
use super::problems::{Problem, Problems};
use crate::mapping::{Layout, NameTemplate, Resolved, Taken};

/// Notes layers and parts that are missing.
///
/// `source` and `target` are the layouts on either side, `None` where that is the published one.
/// Parts of the target's own rules are noted when it is assembled.
pub fn check(
    logical: &LogicalTensors,
    mapping: &Resolved,
    source: Option<&Layout>,
    target: Option<&Layout>,
    problems: &mut Problems,
) {
    let Some(layout) = target.or(source).or_else(|| mapping.layouts().next()) else { return };
    layers(logical, layout, problems);
    if target.is_none() {
        // Only what it refuses is of interest.
        assemble::to_layout(logical, layout, &mut Dropped::new(), &mut Vec::new(), problems);
    }
}

/// Notes layers that have no tensor at all.
///
/// A layer is a value of an index that the config bounds without a default: layers that a
/// checkpoint may lack, such as those of multi-token prediction, have one.
fn layers(logical: &LogicalTensors, layout: &Layout, problems: &mut Problems) {
    let mut seen: BTreeMap<String, (&NameTemplate, u64, BTreeSet<u64>)> = BTreeMap::new();
    for name in logical.keys() {
        let Some(Taken::Map { rule, part, bindings, .. }) = layout.take_hf(name) else { continue };
        let template = &rule.hf[part];
        let Some(var) = template.first_index().filter(|v| rule.stack != Some(*v)) else { continue };
        let layer = (rule.vars.required(var), bindings.index(var), template.up_to_index(0));
        let (Some(count), Some(layer), Some(first)) = layer else { continue };
        seen.entry(first).or_insert_with(|| (template, count, BTreeSet::new())).2.insert(layer);
    }
    for (template, count, layers) in seen.values() {
        let there = u64::try_from(layers.len()).expect("tensors are counted in 32 bits");
        let missing = (0..*count).filter(|l| !layers.contains(l));
        let what = format!("by config.json there are {count}");
        let named = missing.filter_map(|l| Some((template.up_to_index(l)?, what.clone())));
        problems.add_many(Problem::MissingLayer, count - there, named);
    }
}
