//! Loads mapping files and resolves them: checks every rule and looks up the config keys.

use std::path::Path;

use super::layout::{
    Alias, EVERY_NAME, Encoding, Layout, LayoutName, QuantizationConfig, QuantizeSpec,
    ResolvedMapping, Rule, Side, TableRow,
};
use super::raw::{
    OneOrMany, RawConcat, RawEncoding, RawInterleave, RawLayout, RawMapping, RawOp,
    RawQuantization, RawRotary, RawRule, RawScope, RawSide, RawSplit, RawStack, RawWord,
};
use super::require::{condition_holds, is_truthy, requirements, siblings};
use super::template::{ConfigKey, NameTemplate, RawTemplate, Variables};
use super::{ConfigLookup, MappingError, Op};
use crate::codec::Scheme;
use crate::tensor::{DType, to_u64};

/// The built-in mappings: name and text.
const SHIPPED: [(&str, &str); 9] = [
    ("deepseek-v3", include_str!("models/deepseek-v3.toml")),
    ("deepseek-v4", include_str!("models/deepseek-v4.toml")),
    ("glm4-moe", include_str!("models/glm4-moe.toml")),
    ("gpt-oss", include_str!("models/gpt-oss.toml")),
    ("kimi-k25-vl", include_str!("models/kimi-k25-vl.toml")),
    ("mimo-v2-flash", include_str!("models/mimo-v2-flash.toml")),
    ("minimax-m2", include_str!("models/minimax-m2.toml")),
    ("qwen3-moe", include_str!("models/qwen3-moe.toml")),
    ("qwen3-vl-moe", include_str!("models/qwen3-vl-moe.toml")),
];

/// A mapping file that has been parsed but not yet applied to a config.json.
#[derive(Debug)]
pub struct Mapping {
    raw: RawMapping,
}

/// A built-in mapping in a list of models.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ModelName {
    /// Name that selects the mapping.
    pub name: String,
    /// The model family in words.
    pub title: String,
    /// Values of config.json's `model_type` that the mapping is for.
    pub model_types: Vec<String>,
    /// Layouts that it describes, apart from `hf`.
    pub layouts: Vec<String>,
}

/// The built-in mappings, sorted by name.
pub fn shipped() -> Vec<ModelName> {
    SHIPPED
        .iter()
        .map(|(name, _)| Mapping::named(name).expect("a test parses every shipped file").list())
        .collect()
}

impl Mapping {
    /// Parses a mapping; `origin` names it in errors.
    ///
    /// # Errors
    /// The text is not TOML, or not a mapping.
    pub fn parse(origin: &str, text: &str) -> Result<Mapping, MappingError> {
        let raw = toml::from_str(text).map_err(|source| MappingError::Syntax {
            name: origin.to_owned(),
            source: Box::new(source),
        })?;
        Ok(Mapping { raw })
    }

    /// Reads a mapping file.
    ///
    /// # Errors
    /// The file cannot be read, or is not a mapping.
    pub fn load(path: &Path) -> Result<Mapping, MappingError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| MappingError::Io { path: path.to_owned(), source })?;
        Mapping::parse(&path.display().to_string(), &text)
    }

    /// The built-in mapping of this name.
    ///
    /// # Errors
    /// No built-in mapping has this name.
    pub fn named(name: &str) -> Result<Mapping, MappingError> {
        let (name, text) = SHIPPED.iter().find(|(n, _)| *n == name).ok_or_else(|| {
            let known = SHIPPED.iter().map(|(n, _)| (*n).to_owned()).collect();
            MappingError::UnknownModel { name: name.to_owned(), known }
        })?;
        Mapping::parse(name, text)
    }

    /// The built-in mapping for the `model_type` values of a config.json, outermost object first.
    /// The first known value decides.
    ///
    /// # Errors
    /// No built-in mapping is for any of them.
    pub fn for_model_types(types: &[&str]) -> Result<Mapping, MappingError> {
        let shipped = shipped();
        let of = |t: &&str| shipped.iter().find(|m| m.model_types.iter().any(|of| of == t));
        match types.iter().find_map(of) {
            Some(model) => Mapping::named(&model.name),
            None => Err(MappingError::UnknownModelType {
                found: types.iter().map(ToString::to_string).collect(),
                known: shipped.into_iter().flat_map(|m| m.model_types).collect(),
            }),
        }
    }

    /// Its entry in a list of models.
    pub fn list(&self) -> ModelName {
        let layouts = [
            self.raw.native.as_ref().map(|_| LayoutName::Native),
            self.raw.transformers.as_ref().map(|_| LayoutName::Transformers),
        ];
        ModelName {
            name: self.raw.name.clone(),
            title: self.raw.title.clone(),
            model_types: self.raw.model_types.clone(),
            layouts: layouts.into_iter().flatten().map(|l| l.to_string()).collect(),
        }
    }

    /// Checks the mapping and looks up its config keys.
    ///
    /// # Errors
    /// A config key that is absent and has no default, an invalid rule, or a rule that can never
    /// match.
    pub(crate) fn resolve(
        &self,
        config: &ConfigLookup<'_>,
    ) -> Result<ResolvedMapping, MappingError> {
        let raw = &self.raw;
        let mut aliases = Vec::with_capacity(raw.alias.len());
        for alias in &raw.alias {
            let mut vars = Variables::default();
            let from = RawTemplate::parse(&alias.from)?.resolve(&mut vars, config)?;
            let to = RawTemplate::parse(&alias.to)?.resolve(&mut vars, config)?;
            if !vars.shared_by([&from, &to]) {
                let why = "`from` and `to` have different variables";
                return Err(MappingError::rule(&alias.from, why));
            }
            aliases.push(Alias { from, to, vars });
        }
        let rows = raw.native.iter().chain(&raw.transformers).flat_map(|l| &l.rule);
        let used: Vec<&String> = rows.filter_map(|row| row.set.as_ref()).collect();
        if let Some(set) = raw.set.keys().find(|set| !used.contains(set)) {
            return Err(MappingError::rule(set, "a set that no rule uses"));
        }
        let encodings =
            raw.encoding.iter().map(|e| encoding(e, config)).collect::<Result<_, _>>()?;
        let layout = |name, layout: &Option<RawLayout>| {
            layout.as_ref().map(|l| self.layout(name, l, config)).transpose()
        };
        Ok(ResolvedMapping {
            name: raw.name.clone(),
            aliases,
            encodings,
            native: layout(LayoutName::Native, &raw.native)?,
            transformers: layout(LayoutName::Transformers, &raw.transformers)?,
            requirements: requirements(&raw.require, config)?,
            siblings: siblings(&raw.siblings, config)?,
            published_plain: raw.published_plain,
            quantization: raw
                .quantization
                .iter()
                .flat_map(OneOrMany::as_slice)
                .map(quantization)
                .collect::<Result<_, _>>()?,
        })
    }

    /// Resolves the rules of a layout and inserts the sets that it uses.
    fn layout(
        &self,
        name: LayoutName,
        raw: &RawLayout,
        config: &ConfigLookup<'_>,
    ) -> Result<Layout, MappingError> {
        let mut rows = Vec::new();
        for row in &raw.rule {
            let bare = row.names().next().is_none()
                && !row.has_value_keys()
                && row.drop.is_none()
                && row.unless.is_none();
            match (&row.scope, &row.set) {
                (None, None) => rows.extend(resolve_rules(row, None, config)?),
                (Some(scope), Some(set)) if bare => {
                    let rules = self.raw.set.get(set).ok_or_else(|| {
                        MappingError::rule(&scope.hf, format!("no set `{set}` in the file"))
                    })?;
                    if rules.iter().any(|rule| rule.scope.is_some() || rule.set.is_some()) {
                        return Err(MappingError::rule(set, "a set uses no other set"));
                    }
                    for rule in rules {
                        rows.extend(resolve_rules(rule, Some(scope), config)?);
                    }
                }
                (Some(_), _) | (_, Some(_)) => {
                    let rule = row.scope.as_ref().map_or("use", |s| &s.hf);
                    let why = "`scope` and `use` need each other and allow no other key";
                    return Err(MappingError::rule(rule, why));
                }
            }
        }
        let layout = Layout { name, rows, cast_floats: raw.cast_floats };
        layout.refuse_unreachable()?;
        Ok(layout)
    }
}

/// Resolves a `quantization_config`.
fn quantization(raw: &RawQuantization) -> Result<QuantizationConfig, MappingError> {
    let scheme = match &raw.scheme {
        Some(name) => Some(parse_scheme(name, "quantization")?),
        None => None,
    };
    let RawQuantization { within, unquantized, value, .. } = raw.clone();
    Ok(QuantizationConfig { within, unquantized, scheme, value })
}

fn parse_scheme(name: &str, rule: &str) -> Result<Scheme, MappingError> {
    Scheme::parse(name).ok_or_else(|| {
        let known: Vec<_> = Scheme::ALL.iter().map(|(_, n)| *n).collect();
        let why = format!("unknown scheme `{name}`; known: {}", known.join(", "));
        MappingError::rule(rule, why)
    })
}

/// Resolves an encoding.
fn encoding(raw: &RawEncoding, config: &ConfigLookup<'_>) -> Result<Encoding, MappingError> {
    let first = raw.matrix.as_slice().first().cloned().unwrap_or_default();
    let fail = |why: String| MappingError::rule(&first, why);
    let scheme = parse_scheme(&raw.scheme, &first)?;
    if raw.block.contains(&0) {
        return Err(fail("`block` needs two integers above 0".to_owned()));
    }
    let mut vars = Variables::default();
    let mut templates = |texts: &[String]| {
        texts
            .iter()
            .map(|t| RawTemplate::parse(t)?.resolve(&mut vars, config))
            .collect::<Result<Vec<_>, _>>()
    };
    let matrix = templates(raw.matrix.as_slice())?;
    let payload = templates(raw.payload.as_ref().unwrap_or(&raw.matrix).as_slice())?;
    // A list is the spellings of one scale; with `fused-shards`, one entry for each matrix.
    let scales = match raw.fused_shards {
        true => raw.scale.as_slice().iter().map(|s| s.as_slice().to_vec()).collect(),
        false => vec![raw.scale.as_slice().iter().flat_map(|s| s.as_slice().to_vec()).collect()],
    };
    let scale = scales.iter().map(|s: &Vec<String>| templates(s)).collect::<Result<Vec<_>, _>>()?;
    let shape = templates(raw.shape.as_slice())?.pop();
    let expected = if raw.fused_shards { 2 } else { 1 };
    if [matrix.len(), payload.len(), scale.len()] != [expected; 3]
        || scale.iter().any(Vec::is_empty)
    {
        return Err(fail(format!("expected {expected} names for matrix, payload and scale each")));
    }
    if !vars.shared_by(matrix.iter().chain(&payload).chain(scale.iter().flatten()).chain(&shape)) {
        return Err(fail(
            "`matrix`, `payload`, `scale` and `shape` have different variables".to_owned(),
        ));
    }
    let quantize = quantize_spec(raw, scheme, &first, config)?;
    let RawEncoding { block, fused_shards, transposed, .. } = *raw;
    Ok(Encoding {
        scheme,
        matrix,
        payload,
        scale,
        shape,
        block,
        fused_shards,
        transposed,
        quantize,
        vars,
    })
}

/// Resolves the keys of an encoding that are for writing.
fn quantize_spec(
    raw: &RawEncoding,
    scheme: Scheme,
    rule: &str,
    config: &ConfigLookup<'_>,
) -> Result<QuantizeSpec, MappingError> {
    let fail = |why: &str| MappingError::rule(rule, why);
    let resolved = |text: &String| {
        let mut vars = Variables::default();
        Ok((RawTemplate::parse(text)?.resolve(&mut vars, config)?, vars))
    };
    let quantizes = raw.quantizes.iter().map(resolved).collect::<Result<Vec<_>, MappingError>>()?;
    let scale_dtype = match &raw.scale_dtype {
        Some(name) => DType::parse(name)
            .filter(|d| scheme.scale_code(*d).is_some())
            .ok_or_else(|| fail("`scale-dtype` is no dtype that scales of the scheme can have"))?,
        None => scheme.scale_dtype(),
    };
    let shards =
        raw.shards.as_ref().map(|key| ConfigKey::parse(key)?.resolve(config)).transpose()?;
    if raw.fused_shards && !quantizes.is_empty() && shards.is_none() {
        return Err(fail("`quantizes` with `fused-shards` needs `shards`, their number"));
    }
    let active = raw.when.as_ref().is_none_or(|when| condition_holds(when, config));
    Ok(QuantizeSpec { active, quantizes, scale_dtype, shards })
}

/// Resolves a rule of the file; one with `same` gives a rule for each of its names.
fn resolve_rules(
    raw: &RawRule,
    scope: Option<&RawScope>,
    config: &ConfigLookup<'_>,
) -> Result<Vec<TableRow>, MappingError> {
    if let Some(key) = &raw.unless {
        if raw.drop.is_none() {
            let text = raw.names().next().map_or("(without names)", String::as_str);
            return Err(MappingError::rule(text, "`unless` needs `drop`"));
        }
        if is_truthy(config(key).as_ref()) {
            return Ok(Vec::new());
        }
    }
    let Some(same) = &raw.same else { return Ok(vec![resolve_rule(raw, scope, config)?]) };
    if raw.hf.is_some() || raw.to.is_some() || raw.drop.is_some() {
        let text = raw.names().next().map_or("(without names)", String::as_str);
        return Err(MappingError::rule(text, "`same` excludes `hf`, `to` and `drop`"));
    }
    let one = |name: &String| {
        let name = Some(OneOrMany::One(name.clone()));
        let row = RawRule { hf: name.clone(), to: name, same: None, ..raw.clone() };
        resolve_rule(&row, scope, config)
    };
    same.as_slice().iter().map(one).collect()
}

/// Resolves one rule; `scope` has the prefixes of its names.
fn resolve_rule(
    raw: &RawRule,
    scope: Option<&RawScope>,
    config: &ConfigLookup<'_>,
) -> Result<TableRow, MappingError> {
    let mut vars = Variables::default();
    let mut side = |names: &Option<OneOrMany<String>>, prefix: Option<&str>| {
        let names = names.as_ref().map(OneOrMany::as_slice).unwrap_or_default();
        let prefix = prefix.map(RawTemplate::parse).transpose()?;
        names
            .iter()
            .map(|text| {
                let tail = RawTemplate::parse(text)?;
                let whole = prefix.as_ref().map_or(Ok(tail.clone()), |p| p.join(&tail))?;
                whole.resolve(&mut vars, config)
            })
            .collect::<Result<Vec<_>, MappingError>>()
    };
    let hf = side(&raw.hf, scope.map(|s| s.hf.as_str()))?;
    let to = side(&raw.to, scope.map(|s| s.to.as_str()))?;
    let text = raw.names().next().map_or("(without names)", String::as_str).to_owned();
    let fail = |why: &str| MappingError::rule(&text, why);
    if let Some(reason) = &raw.drop {
        if raw.has_value_keys() || hf.len() + to.len() != 1 {
            return Err(fail("a rule that drops has one name and no operation"));
        }
        if hf.iter().chain(&to).any(NameTemplate::matches_every_name) {
            return Err(fail(EVERY_NAME));
        }
        return Ok(TableRow::Drop {
            hf: hf.into_iter().next(),
            to: to.into_iter().next(),
            vars,
            reason: reason.clone(),
            text,
        });
    }
    if hf.is_empty() || to.is_empty() {
        return Err(fail("needs `hf` and `to`"));
    }
    let mut ops = Vec::with_capacity(raw.ops.len());
    let (mut stack, mut tensors) = (None, hf.len());
    for op in &raw.ops {
        ops.push(match op {
            RawOp::Word(RawWord::Transpose) => Op::Transpose,
            RawOp::Concat(RawConcat { concat: axis }) => {
                tensors = 1;
                Op::Concat { axis: *axis }
            }
            RawOp::Interleave(RawInterleave { interleave: axis }) => {
                tensors = 1;
                Op::Interleave { axis: *axis }
            }
            RawOp::Split(RawSplit { split: axis }) => {
                tensors = to.len();
                let parts = to_u64(to.len());
                Op::Split { axis: *axis, parts }
            }
            RawOp::Rotary(RawRotary { rotary: axis, heads, of }) => {
                if of.iter().any(|&i| i >= tensors) {
                    return Err(fail("`of` has a position with no tensor; they count from 0"));
                }
                let heads = ConfigKey::parse(heads)?.resolve(config)?;
                Op::Rotary { axis: *axis, heads, of: of.clone() }
            }
            RawOp::Stack(RawStack { stack: var }) => {
                let var =
                    vars.find(var).ok_or_else(|| fail("stacks a variable that no name has"))?;
                let count =
                    vars.bound(var).ok_or_else(|| fail("stacks a variable without a bound"))?;
                if stack.replace(var).is_some() {
                    return Err(fail("stacks twice"));
                }
                Op::Stack { count }
            }
        });
    }
    if tensors != to.len() {
        let expected = to.len();
        return Err(fail(&format!(
            "expected as many tensors after `ops` as `to` has names, {expected}, got {tensors}"
        )));
    }
    let extent = |key: &String| ConfigKey::parse(key)?.resolve(config);
    let extents = |keys: &Option<Vec<String>>| {
        keys.as_ref().map(|keys| keys.iter().map(extent).collect()).transpose()
    };
    let (hf_shape, piece_shape) = (extents(&raw.hf_shape)?, extents(&raw.piece_shape)?);
    let hf_dtype = match &raw.hf_dtype {
        Some(name) => {
            Some(DType::parse(name).ok_or_else(|| fail("`hf-dtype` is no dtype of safetensors"))?)
        }
        None => None,
    };
    let rule = Rule {
        hf,
        to,
        vars,
        ops,
        stack,
        hf_shape,
        hf_dtype,
        piece_shape,
        reads: raw.reads.map(|side| match side {
            RawSide::Hf => Side::Hf,
            RawSide::To => Side::To,
        }),
        grouped: raw.grouped,
        expert_axis: raw.grouped || raw.expert_axis,
        text,
    };
    rule.check()?;
    Ok(TableRow::Map(rule))
}

#[cfg(test)]
mod tests {
    use super::super::RuleMatch;
    use super::*;

    #[test]
    fn built_in_mappings_parse_and_have_the_names_of_their_files() {
        for (name, _) in SHIPPED {
            assert_eq!(Mapping::named(name).unwrap().list().name, *name);
        }
        let err = Mapping::named("gpt-2").unwrap_err().to_string();
        assert!(err.starts_with("unknown model `gpt-2`; known: "), "{err}");
    }

    #[test]
    fn mistakes_in_rules_are_reported() {
        let rule = |text: &str| format!("name = 'x'\ntitle = 'X'\n[[native.rule]]\n{text}");
        let cases = [
            (rule("hf = 'a.{r}'"), "rule `a.{r}`: needs `hf` and `to`"),
            (
                rule("hf = ['a', 'b']\nto = 'c'"),
                "rule `a`: expected as many tensors after `ops` as `to` has names, 1, got 2",
            ),
            (
                rule("hf = 'a.{e}'\nto = 'c'\nops = [{stack = 'e'}]"),
                "rule `a.{e}`: stacks a variable without a bound",
            ),
            (
                rule("hf = 'a.{e:two}'\nto = 'c'"),
                "rule `a.{e:two}`: `hf` and `to` have different variables",
            ),
            (rule("hf = 'a'\nto = 'b.{r}'"), "rule `a`: `hf` and `to` have different variables"),
            (
                rule("hf = 'a.{r}'\nto = 'a.{r}'\n[[native.rule]]\nhf = 'a.{e:two}'\nto = 'b.{e}'"),
                "rule `a.{e:two}`: can never match, an earlier rule takes all its names",
            ),
            (
                rule("hf = '{r}'\nto = '{r}'"),
                "rule `{r}`: `{r}` alone matches every name: put a prefix before it",
            ),
            (
                rule("use = 'layer'\nscope = {hf = 'a.', to = 'b.'}"),
                "rule `a.`: no set `layer` in the file",
            ),
            (
                rule("use = 'layer'\nscope = {hf = 'a.', to = 'b.'}\ngrouped = true"),
                "rule `a.`: `scope` and `use` need each other and allow no other key",
            ),
            (
                rule("use = 'layer'\nscope = {hf = 'a.', to = 'b.'}\nunless = 'two'"),
                "rule `a.`: `scope` and `use` need each other and allow no other key",
            ),
            (
                rule(
                    "use = 'layer'\nscope = {hf = 'a.', to = 'b.'}\n[[set.layer]]\nsame = 'c'\nuse = 'layer'",
                ),
                "rule `layer`: a set uses no other set",
            ),
            (
                rule("hf = '{r}'\ndrop = 'all'"),
                "rule `{r}`: `{r}` alone matches every name: put a prefix before it",
            ),
            (rule("same = 'a'\nto = 'b'"), "rule `b`: `same` excludes `hf`, `to` and `drop`"),
            (
                rule("same = ['a.{r}', 'a.b']"),
                "rule `a.b`: can never match, an earlier rule takes all its names",
            ),
            (rule("hf = 'a'\nto = 'b'\nunless = 'two'"), "rule `a`: `unless` needs `drop`"),
            (
                rule("hf = 'a'\nto = 'b'\ndrop = 'no'"),
                "rule `a`: a rule that drops has one name and no operation",
            ),
        ];
        let config = |key: &str| (key == "two").then(|| 2.into());
        for (text, message) in cases {
            let err = Mapping::parse("x", &text).unwrap().resolve(&config).unwrap_err();
            assert_eq!(err.to_string(), message);
        }
        let err = Mapping::parse("x", "name = 'x'\ntitel = 'X'").unwrap_err().to_string();
        assert!(err.contains("unknown field `titel`"), "{err}");
    }

    #[test]
    fn each_name_of_a_same_list_is_a_rule() {
        let text = "name = 'x'\ntitle = 'X'
            set.layer = [{ same = ['n.w', 'b'], expert-axis = true }]
            [[native.rule]]
            scope = { hf = 'layers.{l:two}.', to = 'model.layers.{l}.' }
            use = 'layer'
            [[native.rule]]
            same = 'head.{r}'
            grouped = true";
        let config = |key: &str| (key == "two").then(|| 2.into());
        let native = Mapping::parse("x", text).unwrap().resolve(&config).unwrap().native.unwrap();
        let cases = [
            ("layers.1.n.w", Some(("model.layers.1.n.w", false, true))),
            ("layers.0.b", Some(("model.layers.0.b", false, true))),
            ("head.weight", Some(("head.weight", true, true))),
            ("layers.1.n.v", None),
            ("layers.2.b", None),
        ];
        for (hf, expected) in cases {
            let got = match native.match_hf(hf) {
                Some(RuleMatch::Map { rule, bindings, .. }) => {
                    let name = rule.to[0].format(&bindings, &rule.vars).unwrap();
                    Some((name, rule.grouped, rule.expert_axis))
                }
                Some(RuleMatch::Drop { .. }) | None => None,
            };
            assert_eq!(got.as_ref().map(|(n, g, e)| (n.as_str(), *g, *e)), expected, "{hf}");
        }
    }

    #[test]
    fn the_outermost_known_model_type_decides() {
        let chosen = |types: &[&str]| Mapping::for_model_types(types).unwrap().list().name;
        assert_eq!(chosen(&["kimi_k25", "kimi_k2"]), "kimi-k25-vl");
        assert_eq!(chosen(&["kimi_k2"]), "deepseek-v3");
        assert_eq!(chosen(&["wrapped", "gpt_oss"]), "gpt-oss");
        let mut types: Vec<_> = shipped().into_iter().flat_map(|m| m.model_types).collect();
        let all = types.len();
        types.sort();
        types.dedup();
        assert_eq!(types.len(), all, "one mapping for a model type");
    }

    #[test]
    fn a_scope_inserts_the_rules_of_its_set() {
        let text = "name = 'x'\ntitle = 'X'
            set.layer = [{ hf = 'n.{r}', to = 'm.{r}' }]
            [[native.rule]]
            scope = { hf = 'layers.{l:two}.', to = 'model.layers.{l}.' }
            use = 'layer'
            [[native.rule]]
            scope = { hf = 'mtp.{k:two}.', to = 'mtp.layers.{k}.' }
            use = 'layer'";
        let config = |key: &str| (key == "two").then(|| 2.into());
        let native = Mapping::parse("x", text).unwrap().resolve(&config).unwrap().native.unwrap();
        let names = |hf: &str| match native.match_hf(hf) {
            Some(RuleMatch::Map { rule, bindings, .. }) => rule.to[0].format(&bindings, &rule.vars),
            Some(RuleMatch::Drop { .. }) | None => None,
        };
        assert_eq!(names("layers.1.n.w").as_deref(), Some("model.layers.1.m.w"));
        assert_eq!(names("mtp.0.n.w").as_deref(), Some("mtp.layers.0.m.w"));
        assert_eq!(names("mtp.2.n.w"), None);
    }
}
