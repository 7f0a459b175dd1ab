//! A resolved mapping: the config keys of the file are numbers, and rules can be asked which of
//! them matches a name.

use std::fmt;

use super::op::{AssembledTensor, OpError, assemble, disassembled_shape};
use super::require::{Requirement, Siblings};
use super::template::{Bindings, NameTemplate, Var, Variables};
use super::{MappingError, Op};
use crate::codec::Scheme;
use crate::tensor::DType;

/// The tensor layouts that a model can be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LayoutName {
    /// As published: one tensor for each expert and projection.
    Hf,
    /// As NeMo Automodel trains: grouped experts, transposed.
    Native,
    /// As transformers v5 holds the model in memory: grouped experts, not transposed.
    Transformers,
}

impl LayoutName {
    /// The layout's name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            LayoutName::Hf => "hf",
            LayoutName::Native => "native",
            LayoutName::Transformers => "transformers",
        }
    }
}

impl fmt::Display for LayoutName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A mapping for one config.json: all config keys are looked up.
#[derive(Debug)]
pub(crate) struct ResolvedMapping {
    /// Name of the mapping.
    pub name: String,
    /// Other spellings of published names.
    pub aliases: Vec<Alias>,
    /// How quantized matrices are stored; the first encoding that fits a tensor decides.
    pub encodings: Vec<Encoding>,
    /// Rules of the `native` layout.
    pub native: Option<Layout>,
    /// Rules of the `transformers` layout.
    pub transformers: Option<Layout>,
    /// Whether published checkpoints hold no quantized matrix.
    pub published_plain: bool,
    /// What a checkpoint must hold.
    pub requirements: Vec<Requirement>,
    /// Layers that must hold what others of their kind hold.
    pub siblings: Vec<Siblings>,
    /// The `quantization_config` to write; the first whose scheme was written is used.
    pub quantization: Vec<QuantizationConfig>,
}

/// A `quantization_config` of config.json.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct QuantizationConfig {
    /// The object of config.json that contains it; `None`: the top level.
    pub within: Option<String>,
    /// The key of `value` that lists the modules that are not quantized.
    pub unquantized: Option<String>,
    /// The scheme that it is for; `None`: any.
    pub scheme: Option<Scheme>,
    /// The value of `quantization_config`.
    pub value: serde_json::Value,
}

impl ResolvedMapping {
    /// The rules of a layout; `None` for `hf`, which needs none.
    ///
    /// # Errors
    /// The mapping does not describe the layout.
    pub(crate) fn layout(&self, name: LayoutName) -> Result<Option<&Layout>, MappingError> {
        let layout = match name {
            LayoutName::Hf => return Ok(None),
            LayoutName::Native => &self.native,
            LayoutName::Transformers => &self.transformers,
        };
        layout.as_ref().map(Some).ok_or_else(|| MappingError::NoLayout {
            mapping: self.name.clone(),
            layout: name,
            known: std::iter::once("hf".to_owned())
                .chain(self.layouts().map(|l| l.name.to_string()))
                .collect(),
        })
    }

    /// The described layouts, `native` first. A published tensor is known if a rule of one of them
    /// matches it.
    pub(crate) fn layouts(&self) -> impl Iterator<Item = &Layout> {
        self.native.iter().chain(&self.transformers)
    }

    /// The name that rules use for a tensor whose name an alias matches; `None` where none does.
    pub(crate) fn canonical(&self, name: &str) -> Option<String> {
        self.aliases.iter().find_map(|a| a.to.format(&a.from.bind(name, &a.vars)?, &a.vars))
    }
}

/// A second spelling (`from`) of published names (`to`).
#[derive(Debug)]
pub(crate) struct Alias {
    pub(super) from: NameTemplate,
    pub(super) to: NameTemplate,
    pub(super) vars: Variables,
}

/// How quantized matrices are stored.
///
/// With `fused_shards`, the lists have two entries: matrices that were quantized as one, in equal
/// shards, each with the rows of the first matrix before those of the second. Otherwise they have
/// one entry.
#[derive(Debug)]
pub(crate) struct Encoding {
    /// The quantization scheme.
    pub scheme: Scheme,
    /// Names of the decoded matrices.
    pub matrix: Vec<NameTemplate>,
    /// Names of their payloads (the tensors with the codes).
    pub payload: Vec<NameTemplate>,
    /// Names of their scales: for each matrix the accepted spellings, of which the first is
    /// written.
    pub scale: Vec<Vec<NameTemplate>>,
    /// Name of a tensor that holds `[rows, cols]`.
    pub shape: Option<NameTemplate>,
    /// Rows and columns that a scale serves, where config.json does not say.
    pub block: [u64; 2],
    /// Whether the matrices are a pair in which a scale can serve rows of both.
    pub fused_shards: bool,
    /// Whether the payload holds the matrix with its last two axes exchanged.
    pub transposed: bool,
    /// Which matrices to quantize in this encoding, and how.
    pub quantize: QuantizeSpec,
    /// Variables of the templates.
    pub vars: Variables,
}

/// Which matrices to quantize in an encoding when a published checkpoint is written, and how.
#[derive(Debug)]
pub(crate) struct QuantizeSpec {
    /// Whether the `when` condition of the encoding holds.
    pub active: bool,
    /// Published names of the matrices, each template with its own variables.
    pub quantizes: Vec<(NameTemplate, Variables)>,
    /// Dtype of the scales.
    pub scale_dtype: DType,
    /// Number of shards of a fused pair.
    pub shards: Option<u64>,
}

impl QuantizeSpec {
    /// Whether the matrix `name` is to be quantized in this encoding.
    pub(crate) fn matches(&self, name: &str) -> bool {
        self.active
            && self.quantizes.iter().any(|(template, vars)| template.bind(name, vars).is_some())
    }
}

/// One rule of a layout, in file order.
#[derive(Debug)]
pub(crate) enum TableRow {
    /// Maps published tensors to tensors of the layout.
    Map(Rule),
    /// Leaves tensors out that the other side does not have.
    Drop {
        /// Published tensors that the layout does not have.
        hf: Option<NameTemplate>,
        /// Layout tensors that the published checkpoint does not have.
        to: Option<NameTemplate>,
        /// Variables of the template.
        vars: Variables,
        /// The reason, for the summary of the mount.
        reason: String,
        /// The name in the mapping file, for messages.
        text: String,
    },
}

/// The two sides of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Published names.
    Hf,
    /// Names in the layout.
    To,
}

impl TableRow {
    fn templates(&self, side: Side) -> &[NameTemplate] {
        match (self, side) {
            (TableRow::Map(rule), side) => rule.names(side),
            (TableRow::Drop { hf, .. }, Side::Hf) => hf.as_slice(),
            (TableRow::Drop { to, .. }, Side::To) => to.as_slice(),
        }
    }

    fn matches(&self, side: Side, name: &str) -> bool {
        let (TableRow::Map(Rule { vars, .. }) | TableRow::Drop { vars, .. }) = self;
        self.templates(side).iter().any(|t| t.bind(name, vars).is_some())
    }
}

/// Published names, names in the layout, and the operations from one to the other.
#[derive(Debug)]
pub(crate) struct Rule {
    /// Published names, in order. Their tensors are the *parts* of the rule.
    pub hf: Vec<NameTemplate>,
    /// Names in the layout, in order.
    pub to: Vec<NameTemplate>,
    /// Variables of all names.
    pub vars: Variables,
    /// The operations from the parts to the layout's tensors.
    pub ops: Vec<Op>,
    /// The variable that is stacked, if any.
    pub stack: Option<Var>,
    /// Shape of every part, where the mapping gives it.
    pub hf_shape: Option<Vec<u64>>,
    /// Shape of the whole tensor, for one that a distributed save cut into pieces.
    pub piece_shape: Option<Vec<u64>>,
    /// Dtype of the parts in published checkpoints, where the mapping gives it.
    pub hf_dtype: Option<DType>,
    /// For a second spelling: the only side on which the rule matches names.
    pub reads: Option<Side>,
    /// Whether these are expert weights, which always have the output dtype.
    pub grouped: bool,
    /// Whether the first axis of the layout's tensors counts experts.
    pub expert_axis: bool,
    /// The first name of the rule in the mapping file, for messages.
    pub(super) text: String,
}

/// Why a name that is `{r}` alone is refused.
pub(super) const EVERY_NAME: &str = "`{r}` alone matches every name: put a prefix before it";

impl Rule {
    pub(super) fn check(&self) -> Result<(), MappingError> {
        let fail = |why: &str| Err(MappingError::rule(&self.text, why));
        if self.hf.iter().chain(&self.to).any(NameTemplate::matches_every_name) {
            return fail(EVERY_NAME);
        }
        // Names of `to` have all variables except the stacked one.
        let full = |t: &NameTemplate| self.vars.all().all(|v| t.has(v));
        let stacked =
            |t: &NameTemplate| self.vars.all().all(|v| t.has(v) == (self.stack != Some(v)));
        let rest = self.hf[0].has_rest();
        let same_rest = self.hf.iter().chain(&self.to).all(|t| t.has_rest() == rest);
        if !self.hf.iter().all(full) || !self.to.iter().all(stacked) || !same_rest {
            return fail("`hf` and `to` have different variables");
        }
        Ok(())
    }

    /// The names that the rule matches on a side; none on the other side of what it only reads.
    fn names(&self, side: Side) -> &[NameTemplate] {
        match (self.reads, side) {
            (None | Some(Side::Hf), Side::Hf) => &self.hf,
            (None | Some(Side::To), Side::To) => &self.to,
            (Some(Side::Hf), Side::To) | (Some(Side::To), Side::Hf) => &[],
        }
    }

    /// Whether the rule leaves names and values as they are.
    pub(crate) fn is_identity(&self) -> bool {
        self.ops.is_empty() && self.keeps_names()
    }

    /// Whether names are the same on both sides, so that only shapes can tell the sides apart.
    pub(crate) fn keeps_names(&self) -> bool {
        self.hf == self.to
    }

    /// Whether a published tensor of this shape can be a part.
    pub(crate) fn fits_part(&self, shape: &[u64]) -> bool {
        self.hf_shape.as_ref().is_none_or(|expected| expected == shape)
    }

    /// Whether a tensor of this shape can be one of the layout.
    pub(crate) fn fits_layout(&self, shape: &[u64]) -> bool {
        let part = |_| self.part_shape(&vec![shape.to_vec(); self.to.len()]).ok();
        self.hf_shape.as_ref().is_none_or(|expected| part(expected).as_ref() == Some(expected))
    }

    /// Values of the stacked variable; one `None` where the rule does not stack.
    pub(crate) fn stacked(&self) -> impl Iterator<Item = Option<u64>> + Clone + use<> {
        let count = self.stack.and_then(|s| self.vars.bound(s));
        (0..count.unwrap_or(1)).map(move |e| count.map(|_| e))
    }

    /// Number of values of the stacked variable; 1 where the rule does not stack.
    pub(crate) fn stacked_count(&self) -> u64 {
        self.stack.and_then(|s| self.vars.bound(s)).unwrap_or(1)
    }

    /// Number of fragments that [`Rule::assemble`] gives: parts times experts, times two for each
    /// head of a rotary permutation.
    pub(crate) fn fragment_count(&self) -> u64 {
        let parts = u64::try_from(self.hf.len().max(self.to.len())).expect("a rule has few names");
        let factor = |op: &Op| match op {
            Op::Stack { count } => *count,
            Op::Rotary { heads, .. } => heads.saturating_mul(2),
            Op::Transpose | Op::Concat { .. } | Op::Interleave { .. } | Op::Split { .. } => 1,
        };
        self.ops.iter().map(factor).fold(parts, u64::saturating_mul)
    }

    /// Published name of a part, for one value of the stacked variable.
    pub(crate) fn part_name(
        &self,
        part: usize,
        stacked: Option<u64>,
        bindings: &Bindings,
    ) -> Option<String> {
        match self.stack {
            Some(var) => self.hf[part].format(&bindings.with(var, stacked), &self.vars),
            None => self.hf[part].format(bindings, &self.vars),
        }
    }

    /// The layout's tensors, from published tensors of these shapes (one for each part).
    ///
    /// # Errors
    /// An operation cannot be applied to these shapes.
    pub(crate) fn assemble(&self, shapes: &[Vec<u64>]) -> Result<Vec<AssembledTensor>, OpError> {
        assemble(&self.ops, shapes)
    }

    /// The shape of every part, from the shapes of the layout's tensors.
    ///
    /// # Errors
    /// No parts could give these shapes.
    pub(crate) fn part_shape(&self, layout_shapes: &[Vec<u64>]) -> Result<Vec<u64>, OpError> {
        disassembled_shape(&self.ops, self.hf.len(), layout_shapes)
    }
}

/// The rule that matches a name.
#[derive(Debug)]
pub(crate) enum RuleMatch<'a> {
    /// The tensor is mapped.
    Map {
        /// Position of the rule in [`Layout::rows`].
        row: usize,
        /// The rule.
        rule: &'a Rule,
        /// Position of the matching name in the rule's list for that side.
        part: usize,
        /// Values of the variables. The stacked one is unbound in a match of a layout's name.
        bindings: Bindings,
    },
    /// The tensor is left out.
    Drop {
        /// Why.
        reason: &'a str,
    },
}

/// The rules of a layout.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Which layout.
    pub name: LayoutName,
    /// The rules in file order; the first that matches a name decides.
    pub rows: Vec<TableRow>,
    /// Whether every floating-point tensor is cast to the output dtype (to BF16 where that is F32).
    pub cast_floats: bool,
}

impl Layout {
    /// The rule that matches a published name.
    pub(crate) fn match_hf(&self, name: &str) -> Option<RuleMatch<'_>> {
        self.take(name, |rule| rule.names(Side::Hf), |hf, _| hf)
    }

    /// The rule that matches a name of the layout.
    pub(crate) fn match_to(&self, name: &str) -> Option<RuleMatch<'_>> {
        self.take(name, |rule| rule.names(Side::To), |_, to| to)
    }

    /// Like [`Layout::match_to`], but prefers the spelling of a known original: a rule with `reads
    /// = "hf"` is used if `published` has its published names and not those of the usual rule.
    pub(crate) fn match_to_as_published(
        &self,
        name: &str,
        published: impl Fn(&str) -> bool,
    ) -> Option<RuleMatch<'_>> {
        let known = |rule: &Rule, bindings: &Bindings| {
            rule.part_name(0, rule.stack.map(|_| 0), bindings).is_some_and(|n| published(&n))
        };
        let usual = self.match_to(name);
        if let Some(RuleMatch::Map { rule, bindings, .. }) = &usual
            && known(rule, bindings)
        {
            return usual;
        }
        let alternative = self.rows.iter().enumerate().find_map(|(row, line)| {
            let TableRow::Map(rule) = line else { return None };
            let mut names = rule.to.iter().enumerate().filter(|_| rule.reads == Some(Side::Hf));
            let (part, bindings) =
                names.find_map(|(part, t)| Some((part, t.bind(name, &rule.vars)?)))?;
            known(rule, &bindings).then_some(RuleMatch::Map { row, rule, part, bindings })
        });
        alternative.or(usual)
    }

    /// The name of the layout tensor that a published tensor becomes, or becomes a part of.
    pub(crate) fn name_of(&self, hf: &str) -> Option<String> {
        match self.match_hf(hf)? {
            RuleMatch::Map { rule, bindings, .. } => rule.to[0].format(&bindings, &rule.vars),
            RuleMatch::Drop { .. } => None,
        }
    }

    fn take<'a>(
        &'a self,
        name: &str,
        side: impl Fn(&'a Rule) -> &'a [NameTemplate],
        dropped: impl Fn(&'a Option<NameTemplate>, &'a Option<NameTemplate>) -> &'a Option<NameTemplate>,
    ) -> Option<RuleMatch<'a>> {
        self.rows.iter().enumerate().find_map(|(row, line)| match line {
            TableRow::Map(rule) => side(rule).iter().enumerate().find_map(|(part, template)| {
                let bindings = template.bind(name, &rule.vars)?;
                Some(RuleMatch::Map { row, rule, part, bindings })
            }),
            TableRow::Drop { hf, to, vars, reason, .. } => {
                dropped(hf, to).as_ref()?.bind(name, vars)?;
                Some(RuleMatch::Drop { reason })
            }
        })
    }

    /// Whether a rule names this tensor, on either side, by a template without `{r}`. The tensor is
    /// then what the rule says, and not the scale of something because its name ends like one.
    pub(crate) fn names_exactly(&self, name: &str) -> bool {
        self.rows.iter().any(|row| match row {
            TableRow::Map(rule) => {
                let mut names = rule.hf.iter().chain(&rule.to).filter(|t| !t.has_rest());
                names.any(|t| t.bind(name, &rule.vars).is_some())
            }
            TableRow::Drop { .. } => false,
        })
    }

    /// Refuses a rule whose names on a side are all matched by an earlier rule: it would never be
    /// used in that direction, and the earlier rule would give its tensors other names.
    pub(super) fn refuse_unreachable(&self) -> Result<(), MappingError> {
        // Sample names of a rule: the first and last value of each index, and a rest that no
        // literal text of another rule equals.
        let last = |bound: Option<u64>| bound.map_or(u64::MAX / 4, |b| b.saturating_sub(1));
        for (at, row) in self.rows.iter().enumerate() {
            let (vars, text) = match row {
                TableRow::Map(rule) => (&rule.vars, &rule.text),
                TableRow::Drop { vars, text, .. } => (vars, text),
            };
            let ends =
                [Bindings::sample(vars, |_| 0, "\u{1}"), Bindings::sample(vars, last, "\u{1}")];
            // A `drop` with a bound may cover all layers of a later rule for some config.json. That
            // is no mistake of the mapping.
            let earlier = || {
                self.rows[..at].iter().filter(|row| match row {
                    TableRow::Map(_) => true,
                    TableRow::Drop { vars, .. } => vars.all().all(|v| vars.bound(v).is_none()),
                })
            };
            for (side, why) in [
                (Side::Hf, "can never match, an earlier rule takes all its names"),
                (Side::To, "can never match on the way back, an earlier rule takes all its names"),
            ] {
                let names = row.templates(side);
                let mut samples =
                    ends.iter().flat_map(|b| names.iter().filter_map(|t| t.format(b, vars)));
                let taken = |name: String| earlier().any(|r| r.matches(side, &name));
                let unbound = samples.clone().next().is_none();
                if !unbound && samples.all(taken) {
                    return Err(MappingError::rule(text, why));
                }
            }
        }
        Ok(())
    }
}
