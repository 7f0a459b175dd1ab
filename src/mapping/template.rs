//! Name templates: one text that both recognizes tensor names and writes them.
//!
//! ```text
//! model.layers.{l:num_hidden_layers}.mlp.experts.{e:n_routed_experts}.up_proj.weight
//! layers.{k+num_hidden_layers:num_nextn_predict_layers=0}.{r}
//! ```
//! `{l}` is any index, `{l:KEY}` an index below an integer of config.json, and `{l:KEY=0}` the same
//! with a default for a config that lacks the key. `{k+KEY:BOUND}` is an index that is written with
//! an integer of config.json added to it, `{k+KEY+KEY:BOUND}` with two. `{r}` is the rest: one or
//! more characters of anything. Indices are decimal without leading zeros.
//!
//! Parsing gives a [`RawTemplate`]; looking up its config keys gives a [`NameTemplate`].

use std::fmt;

use serde_json::Value;

use super::{ConfigLookup, MappingError};

/// A value of config.json as an integer: a list counts its entries, `true` is 1, `false` is 0.
pub(super) fn integer(value: &Value) -> Option<u64> {
    let entries = |list: &Vec<Value>| u64::try_from(list.len()).ok();
    value
        .as_u64()
        .or_else(|| value.as_bool().map(u64::from))
        .or_else(|| value.as_array().and_then(entries))
}

/// Where to find an integer in config.json: `KEY`, `KEY|OTHER` (the first that is there), `KEY=16`
/// (with a default) or `2*KEY` (twice the value). `a.b` is the key `b` of the object `a`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConfigKey {
    factor: u64,
    keys: Vec<String>,
    default: Option<u64>,
}

impl ConfigKey {
    /// Parses `FACTOR*KEY|KEY…=DEFAULT`; factor, further keys and default are optional.
    ///
    /// # Errors
    /// The factor or the default is no integer, or a key is empty.
    pub(crate) fn parse(text: &str) -> Result<ConfigKey, MappingError> {
        let integer = |n: &str| {
            n.parse().map_err(|_| MappingError::template(text, format!("`{n}` is no integer")))
        };
        let (factor, rest) = match text.split_once('*') {
            None => (1, text),
            Some((n, rest)) => (integer(n)?, rest),
        };
        let (key, default) = match rest.split_once('=') {
            None => (rest, None),
            Some((key, n)) => (key, Some(integer(n)?)),
        };
        let keys: Vec<String> = key.split('|').map(str::to_owned).collect();
        if keys.iter().any(String::is_empty) {
            return Err(MappingError::template(text, "an empty config key"));
        }
        Ok(ConfigKey { factor, keys, default })
    }

    /// Whether config.json must have the integer, because there is no default.
    fn is_required(&self) -> bool {
        self.default.is_none()
    }

    /// Looks the integer up, or takes the default.
    ///
    /// # Errors
    /// All keys are absent and there is no default.
    pub(crate) fn resolve(&self, config: &ConfigLookup<'_>) -> Result<u64, MappingError> {
        self.keys
            .iter()
            .find_map(|key| integer(&config(key)?))
            .or(self.default)
            .map(|n| n.saturating_mul(self.factor))
            .ok_or_else(|| MappingError::MissingConfigKey { key: self.keys.join("` or `") })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum RawSegment {
    Literal(String),
    Index { var: String, plus: Vec<ConfigKey>, bound: Option<ConfigKey> },
    Rest,
}

/// A template as the mapping file has it, before its config keys are looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RawTemplate {
    text: String,
    segments: Vec<RawSegment>,
}

impl RawTemplate {
    /// Parses a template.
    ///
    /// # Errors
    /// Unbalanced braces, a variable that occurs twice, two variables with no text between them, or
    /// an invalid variable name or config key.
    pub(crate) fn parse(text: &str) -> Result<RawTemplate, MappingError> {
        let fail = |why| MappingError::template(text, why);
        let mut segments = Vec::new();
        let mut vars: Vec<&str> = Vec::new();
        let mut left = text;
        while !left.is_empty() {
            let Some(open) = left.find('{') else {
                segments.push(RawSegment::Literal(left.to_owned()));
                break;
            };
            if open > 0 {
                segments.push(RawSegment::Literal(left[..open].to_owned()));
            }
            let close = left
                .find('}')
                .filter(|&c| c > open)
                .ok_or_else(|| fail("a `{` without its `}`"))?;
            let inside = &left[open + 1..close];
            left = &left[close + 1..];
            if matches!(segments.last(), Some(RawSegment::Index { .. } | RawSegment::Rest)) {
                return Err(fail("two variables with nothing between them"));
            }
            let (head, bound) = match inside.split_once(':') {
                None => (inside, None),
                Some((head, key)) => (head, Some(ConfigKey::parse(key)?)),
            };
            let (var, plus) = match head.split_once('+') {
                None => (head, Vec::new()),
                Some((var, keys)) => {
                    (var, keys.split('+').map(ConfigKey::parse).collect::<Result<_, _>>()?)
                }
            };
            if var.is_empty() || !var.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
                return Err(fail("a variable needs a name of letters, digits and `_`"));
            }
            if vars.contains(&var) {
                return Err(fail("a variable that occurs twice"));
            }
            vars.push(var);
            if var == "r" {
                if bound.is_some() || !plus.is_empty() {
                    return Err(fail("`{r}` takes no bound"));
                }
                segments.push(RawSegment::Rest);
            } else {
                segments.push(RawSegment::Index { var: var.to_owned(), plus, bound });
            }
        }
        if segments.iter().any(|p| matches!(p, RawSegment::Literal(l) if l.contains('}'))) {
            return Err(fail("a `}` without its `{`"));
        }
        Ok(RawTemplate { text: text.to_owned(), segments })
    }

    /// The template `self` followed by `tail`: a scope's prefix and a rule's name.
    ///
    /// # Errors
    /// As [`RawTemplate::parse`].
    pub(crate) fn join(&self, tail: &RawTemplate) -> Result<RawTemplate, MappingError> {
        RawTemplate::parse(&format!("{}{}", self.text, tail.text))
    }

    /// Looks up the config keys and adds the variables to `vars`, which all names of a rule share.
    ///
    /// # Errors
    /// A config key that is absent and has no default, or a variable with two different bounds.
    pub(crate) fn resolve(
        &self,
        vars: &mut Variables,
        config: &ConfigLookup<'_>,
    ) -> Result<NameTemplate, MappingError> {
        let mut segments = Vec::with_capacity(self.segments.len());
        for segment in &self.segments {
            segments.push(match segment {
                RawSegment::Literal(l) => Segment::Literal(l.as_str().into()),
                RawSegment::Rest => Segment::Rest,
                RawSegment::Index { var, plus, bound } => {
                    let required = bound.as_ref().is_some_and(ConfigKey::is_required);
                    let bound = bound.as_ref().map(|b| b.resolve(config)).transpose()?;
                    let plus = plus.iter().try_fold(0, |sum: u64, key| {
                        Ok::<_, MappingError>(sum.saturating_add(key.resolve(config)?))
                    })?;
                    let var = vars.declare(var, bound, required).ok_or_else(|| {
                        MappingError::template(&self.text, "a variable with two bounds")
                    })?;
                    Segment::Index { var, plus }
                }
            });
        }
        Ok(NameTemplate { segments })
    }
}

impl fmt::Display for RawTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Position of an index variable in the [`Variables`] of its rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Var(usize);

/// The index variables of a rule, with their bounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Variables(Vec<Variable>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Variable {
    name: String,
    bound: Option<u64>,
    required: bool,
}

impl Variables {
    fn declare(&mut self, name: &str, bound: Option<u64>, required: bool) -> Option<Var> {
        if let Some(i) = self.0.iter().position(|v| v.name == name) {
            let known = &mut self.0[i];
            known.required |= required;
            match (known.bound, bound) {
                (None, Some(_)) => known.bound = bound,
                (Some(a), Some(b)) if a != b => return None,
                (_, None) | (Some(_), Some(_)) => {}
            }
            return Some(Var(i));
        }
        self.0.push(Variable { name: name.to_owned(), bound, required });
        Some(Var(self.0.len() - 1))
    }

    /// The variable of this name.
    pub(crate) fn find(&self, name: &str) -> Option<Var> {
        self.0.iter().position(|v| v.name == name).map(Var)
    }

    /// The number of values that the variable can have; `None` where it has no bound.
    pub(crate) fn bound(&self, var: Var) -> Option<u64> {
        self.0[var.0].bound
    }

    /// The variable's bound, where it is a config key without default: a checkpoint must then have
    /// tensors for all values.
    pub(crate) fn required(&self, var: Var) -> Option<u64> {
        self.0[var.0].bound.filter(|_| self.0[var.0].required)
    }

    /// Whether every template has all variables, and all or none have `{r}`. Whatever one of them
    /// binds, the others can then write.
    pub(crate) fn shared_by<'a>(
        &self,
        templates: impl IntoIterator<Item = &'a NameTemplate>,
    ) -> bool {
        let mut rest = None;
        templates.into_iter().all(|t| {
            let same = *rest.get_or_insert(t.has_rest()) == t.has_rest();
            same && self.all().all(|v| t.has(v))
        })
    }

    /// All variables, in the order of their first use.
    pub(crate) fn all(&self) -> impl Iterator<Item = Var> + use<> {
        (0..self.0.len()).map(Var)
    }
}

/// The values that a name gives to the variables of a template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Bindings {
    indices: Vec<Option<u64>>,
    rest: Option<Box<str>>,
}

impl Bindings {
    /// The value of an index variable; `None` where it is unbound.
    pub(crate) fn index(&self, var: Var) -> Option<u64> {
        self.indices.get(var.0).copied().flatten()
    }

    /// The text that `{r}` stands for.
    pub(crate) fn rest(&self) -> Option<&str> {
        self.rest.as_deref()
    }

    /// A copy in which `var` has this value, or is unbound.
    pub(crate) fn with(&self, var: Var, value: Option<u64>) -> Bindings {
        let mut out = self.clone();
        if out.indices.len() <= var.0 {
            out.indices.resize(var.0 + 1, None);
        }
        out.indices[var.0] = value;
        out
    }

    /// Sample bindings for a rule: each variable gets `index(its bound)`, and `{r}` gets `rest`.
    pub(crate) fn sample(
        vars: &Variables,
        index: impl Fn(Option<u64>) -> u64,
        rest: &str,
    ) -> Bindings {
        let indices = vars.0.iter().map(|v| Some(index(v.bound))).collect();
        Bindings { indices, rest: Some(rest.into()) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    Literal(Box<str>),
    Index { var: Var, plus: u64 },
    Rest,
}

/// A template that is ready to use: its bounds and offsets are numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NameTemplate {
    segments: Vec<Segment>,
}

impl NameTemplate {
    /// The bindings with which the template gives `name`; `None` where it does not match.
    pub(crate) fn bind(&self, name: &str, vars: &Variables) -> Option<Bindings> {
        let mut bound = Bindings::default();
        let rest_at = self.segments.iter().position(|p| *p == Segment::Rest);
        let (before, after) = match rest_at {
            None => (&self.segments[..], &[][..]),
            Some(i) => (&self.segments[..i], &self.segments[i + 1..]),
        };
        // The cheap test first: most names of a checkpoint already differ in the literal end.
        if let Some(Segment::Literal(l)) = after.last()
            && !name.ends_with(&**l)
        {
            return None;
        }
        let mut left = name;
        for segment in before {
            match segment {
                Segment::Literal(l) => left = left.strip_prefix(&**l)?,
                Segment::Index { var, plus } => {
                    let digits = left.bytes().take_while(u8::is_ascii_digit).count();
                    let (number, rest) = left.split_at(digits);
                    bound = bound.with(*var, Some(read_index(number, *plus, vars.bound(*var))?));
                    left = rest;
                }
                Segment::Rest => return None,
            }
        }
        for segment in after.iter().rev() {
            match segment {
                Segment::Literal(l) => left = left.strip_suffix(&**l)?,
                Segment::Index { var, plus } => {
                    let digits = left.bytes().rev().take_while(u8::is_ascii_digit).count();
                    let (rest, number) = left.split_at(left.len() - digits);
                    bound = bound.with(*var, Some(read_index(number, *plus, vars.bound(*var))?));
                    left = rest;
                }
                Segment::Rest => return None,
            }
        }
        match rest_at {
            Some(_) if !left.is_empty() => bound.rest = Some(left.into()),
            None if left.is_empty() => {}
            Some(_) | None => return None,
        }
        Some(bound)
    }

    /// Writes the name for these bindings; `None` where a variable is unbound or an index is not
    /// below its bound.
    pub(crate) fn format(&self, bindings: &Bindings, vars: &Variables) -> Option<String> {
        use fmt::Write;
        let mut name = String::new();
        for segment in &self.segments {
            match segment {
                Segment::Literal(l) => name.push_str(l),
                Segment::Rest => name.push_str(bindings.rest.as_deref()?),
                Segment::Index { var, plus } => {
                    let i = bindings.index(*var)?;
                    if vars.bound(*var).is_some_and(|b| i >= b) {
                        return None;
                    }
                    write!(name, "{}", i.checked_add(*plus)?).expect("a string takes every write");
                }
            }
        }
        Some(name)
    }

    /// The first variable of the template; `None` where that is `{r}` or there is none.
    pub(crate) fn first_index(&self) -> Option<Var> {
        self.segments.iter().find_map(|p| match p {
            Segment::Literal(_) => None,
            Segment::Index { var, .. } => Some(Some(*var)),
            Segment::Rest => Some(None),
        })?
    }

    /// The beginning of a name up to its first index, which is `i`: `model.layers.3`. `None` where
    /// the template has no index before `{r}`.
    pub(crate) fn prefix_through_index(&self, i: u64) -> Option<String> {
        let mut start = String::new();
        for segment in &self.segments {
            match segment {
                Segment::Literal(l) => start.push_str(l),
                Segment::Index { plus, .. } => {
                    return Some(format!("{start}{}", i.checked_add(*plus)?));
                }
                Segment::Rest => return None,
            }
        }
        None
    }

    /// Whether the template has this variable.
    pub(crate) fn has(&self, wanted: Var) -> bool {
        self.segments.iter().any(|p| matches!(p, Segment::Index { var, .. } if *var == wanted))
    }

    /// Whether the template is `{r}` alone, which matches every name.
    pub(crate) fn matches_every_name(&self) -> bool {
        self.segments == [Segment::Rest]
    }

    /// Whether the template has `{r}`.
    pub(crate) fn has_rest(&self) -> bool {
        self.segments.contains(&Segment::Rest)
    }
}

/// Parses an index that was written with `plus` added to it; `None` where it is not below its
/// bound.
fn read_index(digits: &str, plus: u64, bound: Option<u64>) -> Option<u64> {
    if digits.is_empty() || (digits.len() > 1 && digits.starts_with('0')) {
        return None;
    }
    let i = digits.parse::<u64>().ok()?.checked_sub(plus)?;
    (bound.is_none_or(|b| i < b)).then_some(i)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(key: &str) -> Option<Value> {
        match key {
            "layers" => Some(48.into()),
            "experts" => Some(256.into()),
            "stages" => Some(vec![40, 41, 42].into()),
            _ => None,
        }
    }

    fn template(text: &str) -> (NameTemplate, Variables) {
        let mut vars = Variables::default();
        let t = RawTemplate::parse(text).unwrap().resolve(&mut vars, &config).unwrap();
        (t, vars)
    }

    #[test]
    fn templates_match_only_names_within_their_bounds() {
        let cases = [
            ("a.{l:layers}.b", "a.47.b", true),
            ("a.{l:layers}.b", "a.48.b", false),
            ("a.{l:layers}.b", "a.07.b", false),
            ("a.{l:layers}.b", "a.0.b", true),
            ("a.{l:layers}.b", "a..b", false),
            ("a.{l:layers}.b", "a.1.bc", false),
            ("a.{l}.b", "a.99999999999999999999999.b", false),
            ("m.{k+layers:experts}.{r}", "m.48.x.y", true),
            ("m.{k+layers:experts}.{r}", "m.47.x", false),
            ("m.{k+layers+experts}.{r}", "m.304.x", true),
            ("m.{k+layers+experts}.{r}", "m.303.x", false),
            ("m.{k+layers+absent=2}.{r}", "m.50.x", true),
            ("m.{k:absent=0}.{r}", "m.0.x", false),
            ("m.{k:stages|layers}.{r}", "m.2.x", true),
            ("m.{k:stages|layers}.{r}", "m.3.x", false),
            ("{r}.weight", "x.weight", true),
            ("{r}.weight", ".weight", false),
            ("a.{r}.e{i}", "a.b.e12", true),
        ];
        for (text, name, taken) in cases {
            let (t, vars) = template(text);
            assert_eq!(t.bind(name, &vars).is_some(), taken, "`{text}` on `{name}`");
        }
    }

    #[test]
    fn bad_templates_are_refused() {
        for text in [
            "a{",
            "a}",
            "{r}.{r}",
            "{a}{b}",
            "{a}.{a}",
            "{}",
            "{a:}",
            "{r:layers}",
            "{a:k=x}",
            "{a+b+}",
        ] {
            assert!(RawTemplate::parse(text).is_err(), "`{text}`");
        }
        let mut vars = Variables::default();
        let missing = RawTemplate::parse("{l:absent}").unwrap().resolve(&mut vars, &config);
        assert_eq!(
            missing.unwrap_err().to_string(),
            "config.json has no integer `absent`, which the mapping needs"
        );
    }

    proptest! {
        #[test]
        fn a_formatted_name_binds_to_the_same_values(
            l in 0u64..48, e in 0u64..256, rest in "[a-z0-9._]{1,12}", which in 0usize..4,
        ) {
            let texts = [
                "model.layers.{l:layers}.experts.{e:experts}.{r}",
                "{r}.layers.{l:layers}.x.{e:experts}",
                "x{l+experts:layers}-{e}.{r}.weight",
                "layers.{l}.{r}.scale",
            ];
            let (t, vars) = template(texts[which]);
            let mut b = Bindings { indices: Vec::new(), rest: Some(rest.as_str().into()) };
            for (name, value) in [("l", l), ("e", e)] {
                if let Some(var) = vars.find(name) {
                    b = b.with(var, Some(value));
                }
            }
            let name = t.format(&b, &vars).unwrap();
            prop_assert_eq!(t.bind(&name, &vars), Some(b), "{}", name);
        }
    }
}
