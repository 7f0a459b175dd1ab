//! Requirements: the tensors that a checkpoint must hold, by their published names.
//!
//! Rules decide about the tensors that are there; a requirement reports one that is missing. It
//! names tensors of the model as a whole (the embedding) or of each layer (a norm), with a choice
//! where layers differ (a dense MLP, or a router and experts). `siblings` covers what a mapping
//! does not list: a layer must hold what other layers of its kind hold.

use std::collections::BTreeSet;

use serde_json::Value;

use super::raw::{OneOrMany, RawRequirement, RawSiblings, RawWhen};
use super::template::{Bindings, NameTemplate, RawTemplate, Variables};
use super::{ConfigLookup, MappingError};

/// A required name, relative to its scope. Its own variable, if any, counts experts.
#[derive(Debug)]
pub(crate) struct RequiredName {
    template: NameTemplate,
    vars: Variables,
}

impl RequiredName {
    fn parse(text: &str, config: &ConfigLookup<'_>) -> Result<RequiredName, MappingError> {
        let mut vars = Variables::default();
        let template = RawTemplate::parse(text)?.resolve(&mut vars, config)?;
        Ok(RequiredName { template, vars })
    }

    fn parse_all(
        texts: &[String],
        config: &ConfigLookup<'_>,
    ) -> Result<Vec<RequiredName>, MappingError> {
        texts.iter().map(|text| RequiredName::parse(text, config)).collect()
    }

    /// Whether this is one of the names that it stands for.
    pub(crate) fn matches(&self, name: &str) -> bool {
        self.template.bind(name, &self.vars).is_some()
    }

    /// Whether `names` has one of the names that it stands for.
    pub(crate) fn is_in(&self, names: &BTreeSet<&str>) -> bool {
        match self.template.format(&Bindings::default(), &self.vars) {
            Some(name) => names.contains(&*name),
            None => names.iter().any(|name| self.matches(name)),
        }
    }

    /// Number of names that it stands for: one, or as many as its index has values.
    pub(crate) fn count(&self) -> u64 {
        self.vars.all().next().map_or(1, |var| self.vars.bound(var).unwrap_or(1))
    }

    /// Whether it has an index, and so stands for one tensor of each expert.
    pub(crate) fn is_indexed(&self) -> bool {
        self.vars.all().next().is_some()
    }

    /// All names that it stands for, in order.
    pub(crate) fn names(&self) -> impl Iterator<Item = String> {
        let var = self.vars.all().next();
        (0..self.count()).filter_map(move |i| {
            let bindings = match var {
                Some(var) => Bindings::default().with(var, Some(i)),
                None => Bindings::default(),
            };
            self.template.format(&bindings, &self.vars)
        })
    }
}

/// A prefix with one index, `model.layers.{l:num_hidden_layers}.`: the layers of one numbering.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Scope {
    template: NameTemplate,
    vars: Variables,
}

impl Scope {
    fn parse(text: &str, config: &ConfigLookup<'_>) -> Result<Scope, MappingError> {
        let mut vars = Variables::default();
        let template = RawTemplate::parse(&format!("{text}{{r}}"))?.resolve(&mut vars, config)?;
        if vars.all().count() != 1 || !text.ends_with('.') {
            let why = "a scope ends in a dot and has one index, that of its layers";
            return Err(MappingError::rule(text, why));
        }
        Ok(Scope { template, vars })
    }

    /// Splits a tensor name into its layer and its name within the layer; `None` where the tensor
    /// is outside the scope.
    pub(crate) fn split<'n>(&self, name: &'n str) -> Option<(u64, &'n str)> {
        let bindings = self.template.bind(name, &self.vars)?;
        let layer = bindings.index(self.vars.all().next()?)?;
        // `{r}` stands at the end of the template.
        Some((layer, &name[name.len() - bindings.rest()?.len()..]))
    }

    /// Number of layers by config.json; `None` where the index has no bound.
    pub(crate) fn count(&self) -> Option<u64> {
        self.vars.all().next().and_then(|var| self.vars.bound(var))
    }

    /// The prefix of a layer without the dot: `model.layers.3`.
    pub(crate) fn layer(&self, layer: u64) -> String {
        self.template.prefix_through_index(layer).unwrap_or_default()
    }

    /// The full name of a tensor of a layer.
    pub(crate) fn join(&self, layer: u64, name: &str) -> String {
        format!("{}.{name}", self.layer(layer))
    }
}

/// Tensors that a checkpoint must hold.
#[derive(Debug)]
pub(crate) struct Requirement {
    /// Each layer of this scope must hold them; `None`: the model as a whole.
    pub scope: Option<Scope>,
    /// Restricts the requirement to layers (or a model) that hold this tensor.
    pub beside: Option<RequiredName>,
    /// Restricts the requirement to these layers.
    pub layers: Option<BTreeSet<u64>>,
    /// Lists of names, of which one must be complete.
    pub one_of: Vec<Vec<RequiredName>>,
}

/// Layers that must hold what other layers of their kind hold.
///
/// Two layers are of one kind if they have the same list of every `one-of` of the scope.
#[derive(Debug)]
pub(crate) struct Siblings {
    /// The layers.
    pub scope: Scope,
    /// Tensors that a layer may lack nevertheless.
    pub may_lack: Vec<RequiredName>,
}

/// Whether a `when` condition holds: the key has this text, does not have it, or is true or above
/// 0.
pub(super) fn condition_holds(when: &RawWhen, config: &ConfigLookup<'_>) -> bool {
    let value = config(&when.key);
    let is = |text: &String| value.as_ref().and_then(Value::as_str) == Some(text);
    match (&when.is, &when.is_not) {
        (None, None) => is_truthy(value.as_ref()),
        (wanted, other) => wanted.as_ref().is_none_or(is) && !other.as_ref().is_some_and(is),
    }
}

/// Whether a value of config.json is true, a number above 0 or a list with entries.
pub(super) fn is_truthy(value: Option<&Value>) -> bool {
    value.and_then(super::template::integer).is_some_and(|n| n > 0)
}

/// The positions in a list of the entries that are true or above 0.
fn set_entries(entries: &[Value]) -> BTreeSet<u64> {
    (0..).zip(entries).filter(|(_, entry)| is_truthy(Some(entry))).map(|(i, _)| i).collect()
}

pub(super) fn requirements(
    raw: &[RawRequirement],
    config: &ConfigLookup<'_>,
) -> Result<Vec<Requirement>, MappingError> {
    let mut out = Vec::new();
    for block in raw {
        let unless = block.unless.as_ref().map(OneOrMany::as_slice).unwrap_or_default();
        if unless.iter().any(|key| is_truthy(config(key).as_ref()))
            || block.when.as_ref().is_some_and(|when| !condition_holds(when, config))
        {
            continue;
        }
        let names = block.names.as_ref().map(OneOrMany::as_slice).unwrap_or_default();
        let first = names.iter().chain(block.one_of.iter().flatten()).next();
        let fail = |why| {
            let text = first.map_or("(without names)", String::as_str);
            Err(MappingError::rule(text, why))
        };
        if names.is_empty() == block.one_of.is_empty() {
            return fail("a requirement has `names` or `one-of`");
        }
        if block.layers.is_some() && block.scope.is_none() {
            return fail("`layers` needs a `scope`");
        }
        let layers = match &block.layers {
            Some(key) => match config(key) {
                Some(Value::Array(entries)) => Some(set_entries(&entries)),
                Some(_) | None => continue,
            },
            None => None,
        };
        let scopes = block.scope.as_ref().map(OneOrMany::as_slice).unwrap_or_default();
        let scopes: Vec<Option<&String>> =
            if scopes.is_empty() { vec![None] } else { scopes.iter().map(Some).collect() };
        for scope in scopes {
            let sets = block.one_of.iter().map(Vec::as_slice);
            let sets = sets.chain((!names.is_empty()).then_some(names));
            out.push(Requirement {
                scope: scope.map(|text| Scope::parse(text, config)).transpose()?,
                layers: layers.clone(),
                beside: block
                    .beside
                    .as_ref()
                    .map(|text| RequiredName::parse(text, config))
                    .transpose()?,
                one_of: sets
                    .map(|set| RequiredName::parse_all(set, config))
                    .collect::<Result<_, _>>()?,
            });
        }
    }
    Ok(out)
}

pub(super) fn siblings(
    raw: &[RawSiblings],
    config: &ConfigLookup<'_>,
) -> Result<Vec<Siblings>, MappingError> {
    let mut out = Vec::new();
    for block in raw {
        for scope in block.scope.as_slice() {
            let scope = Scope::parse(scope, config)?;
            out.push(Siblings {
                scope,
                may_lack: RequiredName::parse_all(&block.may_lack, config)?,
            });
        }
    }
    Ok(out)
}
