//! A mapping tied to one checkpoint's config: rules that take names, in file order.

use std::fmt;

use super::op::{AssembledTensor, OpError, assemble, disassembled_shape};
use super::require::{Requirement, Siblings};
use super::template::{Bindings, NameTemplate, Var, Variables};
use super::{MappingError, Op};
use crate::codec::Scheme;
use crate::tensor::DType;

/// The layouts that a model can be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LayoutName {
    /// As published: one tensor for each expert and projection.
    Hf,
    /// The training framework's: grouped experts, transposed.
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

/// A mapping whose templates and operations hold numbers.
#[derive(Debug)]
pub(crate) struct ResolvedMapping {
    /// Value of `--model`.
    pub name: String,
    /// Other names under which checkpoints hold the same tensors.
    pub aliases: Vec<Alias>,
    /// How checkpoints hold quantized matrices; the first that fits decides.
    pub encodings: Vec<Encoding>,
    /// The grouped-expert layout.
    pub native: Option<Layout>,
    /// The in-memory layout of transformers.
    pub transformers: Option<Layout>,
    /// Whether the published checkpoints hold no quantized matrix.
    pub published_plain: bool,
    /// What a checkpoint must hold.
    pub requirements: Vec<Requirement>,
    /// Layers that must hold what others of their kind hold.
    pub siblings: Vec<Siblings>,
    /// What config.json of a published checkpoint says of its quantization; the first that fits.
    pub quantization: Vec<QuantizationConfig>,
}

/// `quantization_config` of a published checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct QuantizationConfig {
    /// The object of config.json that holds it; the top level where there is none.
    pub within: Option<String>,
    /// The key of its value that lists the modules that are not quantized, where it has one.
    pub unquantized: Option<String>,
    /// The scheme that it is for; `None`: any.
    pub scheme: Option<Scheme>,
    /// Its value.
    pub value: serde_json::Value,
}

impl ResolvedMapping {
    /// The rules of a layout; `None` for `hf`, whose names need none.
    ///
    /// # Errors
    /// A layout that the mapping does not describe.
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

    /// The described layouts, `native` first: together their rules name every checkpoint tensor.
    pub(crate) fn layouts(&self) -> impl Iterator<Item = &Layout> {
        self.native.iter().chain(&self.transformers)
    }

    /// The name under which the rules know a checkpoint tensor.
    pub(crate) fn canonical(&self, name: &str) -> Option<String> {
        self.aliases.iter().find_map(|a| a.to.format(&a.from.bind(name, &a.vars)?, &a.vars))
    }
}

/// Two names for the same checkpoint tensors.
#[derive(Debug)]
pub(crate) struct Alias {
    pub(super) from: NameTemplate,
    pub(super) to: NameTemplate,
    pub(super) vars: Variables,
}

/// How a checkpoint holds quantized matrices.
///
/// With `fused_shards` the matrices come in pairs that were quantized as one, first rows then
/// second rows, in shards of equal size; otherwise each list has one entry.
#[derive(Debug)]
pub(crate) struct Encoding {
    /// Codes and geometry.
    pub scheme: Scheme,
    /// Names of the decoded matrices.
    pub matrix: Vec<NameTemplate>,
    /// Names of their payloads.
    pub payload: Vec<NameTemplate>,
    /// Names of their scales: for each matrix the spellings that occur, of which the first is
    /// written back.
    pub scale: Vec<Vec<NameTemplate>>,
    /// Name of a tensor that holds `[rows, cols]`.
    pub shape: Option<NameTemplate>,
    /// Rows and columns that a scale serves, where config.json says nothing else.
    pub block: [u64; 2],
    /// Whether a scale can serve rows of both matrices of a pair.
    pub fused_shards: bool,
    /// Whether the payload holds the matrix with its last two axes exchanged.
    pub transposed: bool,
    /// What it says of the way back to the published checkpoint.
    pub quantize: QuantizeSpec,
    /// Variables of the templates.
    pub vars: Variables,
}

/// Which matrices published checkpoints hold in an encoding.
#[derive(Debug)]
pub(crate) struct QuantizeSpec {
    /// Whether config.json lets the encoding be used.
    pub active: bool,
    /// Names of the matrices, each with its own variables.
    pub quantizes: Vec<(NameTemplate, Variables)>,
    /// Dtype of the scales.
    pub scale_dtype: DType,
    /// Shards of a fused pair.
    pub shards: Option<u64>,
}

impl QuantizeSpec {
    /// Whether published checkpoints hold the matrix `name` in this encoding.
    pub(crate) fn takes(&self, name: &str) -> bool {
        self.active
            && self.quantizes.iter().any(|(template, vars)| template.bind(name, vars).is_some())
    }
}

/// A line of a layout's table.
#[derive(Debug)]
pub(crate) enum TableRow {
    /// Ties names of the checkpoint to names of the layout.
    Map(Rule),
    /// Leaves tensors out of the other side, and says why.
    Drop {
        /// Checkpoint tensors that the layout does not hold.
        hf: Option<NameTemplate>,
        /// Layout tensors that the checkpoint does not hold.
        to: Option<NameTemplate>,
        /// Variables of the template.
        vars: Variables,
        /// What the mount's summary says of them.
        reason: String,
        /// The name as the file writes it.
        text: String,
    },
}

/// The two sides of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The checkpoint's names.
    Hf,
    /// The layout's names.
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

    fn takes(&self, side: Side, name: &str) -> bool {
        let (TableRow::Map(Rule { vars, .. }) | TableRow::Drop { vars, .. }) = self;
        self.templates(side).iter().any(|t| t.bind(name, vars).is_some())
    }
}

/// Names of the checkpoint, names of the layout, and the operations from one to the other.
#[derive(Debug)]
pub(crate) struct Rule {
    /// Checkpoint names: the parts, in order.
    pub hf: Vec<NameTemplate>,
    /// Layout names, in order.
    pub to: Vec<NameTemplate>,
    /// Variables of all names.
    pub vars: Variables,
    /// From the parts to the layout's tensors.
    pub ops: Vec<Op>,
    /// The variable that is stacked, if any.
    pub stack: Option<Var>,
    /// Extents of every part, where the mapping states them.
    pub hf_shape: Option<Vec<u64>>,
    /// Extents of a tensor that is put together from pieces, where the mapping states them.
    pub piece_shape: Option<Vec<u64>>,
    /// Dtype of the parts in published checkpoints, where the mapping states it.
    pub hf_dtype: Option<DType>,
    /// The side whose names are only read, where another rule writes them: a second spelling.
    pub reads: Option<Side>,
    /// Whether these are expert weights, which always have the output dtype.
    pub grouped: bool,
    /// Whether the layout's first axis counts experts.
    pub expert_axis: bool,
    pub(super) text: String,
}

impl Rule {
    pub(super) fn check(&self) -> Result<(), MappingError> {
        let fail = |why: &str| Err(MappingError::rule(&self.text, why));
        if self.hf.iter().chain(&self.to).any(NameTemplate::matches_every_name) {
            return fail("takes every name; name a namespace");
        }
        // A name of `to` lacks the stacked variable and has all others.
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

    /// The names that the rule takes on a side; none on the side opposite to what it only reads.
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

    /// Whether names are the same on both sides, so that only shapes tell one from the other.
    pub(crate) fn keeps_names(&self) -> bool {
        self.hf == self.to
    }

    /// Whether a checkpoint tensor of this shape can be a part.
    pub(crate) fn fits_part(&self, shape: &[u64]) -> bool {
        self.hf_shape.as_ref().is_none_or(|expected| expected == shape)
    }

    /// Whether layout tensors of this shape can be made of parts.
    pub(crate) fn fits_layout(&self, shape: &[u64]) -> bool {
        let part = |_| self.part_shape(&vec![shape.to_vec(); self.to.len()]).ok();
        self.hf_shape.as_ref().is_none_or(|expected| part(expected).as_ref() == Some(expected))
    }

    /// Values of the stacked variable; one `None` where the rule does not stack.
    pub(crate) fn stacked(&self) -> impl Iterator<Item = Option<u64>> + Clone + use<> {
        let count = self.stack.and_then(|s| self.vars.bound(s));
        (0..count.unwrap_or(1)).map(move |e| count.map(|_| e))
    }

    /// How many values the stacked variable has; 1 where the rule does not stack.
    pub(crate) fn stacked_count(&self) -> u64 {
        self.stack.and_then(|s| self.vars.bound(s)).unwrap_or(1)
    }

    /// How many pieces the layout's tensors are made of, at one binding: parts times experts, times
    /// two for each head of a rotary permutation.
    pub(crate) fn fragment_count(&self) -> u64 {
        let parts = u64::try_from(self.hf.len().max(self.to.len())).expect("a rule has few names");
        let factor = |op: &Op| match op {
            Op::Stack { count } => *count,
            Op::Rotary { heads, .. } => heads.saturating_mul(2),
            Op::Transpose | Op::Concat { .. } | Op::Interleave { .. } | Op::Split { .. } => 1,
        };
        self.ops.iter().map(factor).fold(parts, u64::saturating_mul)
    }

    /// Checkpoint name of a part, at an index of the stacked variable.
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

    /// The layout's tensors, from checkpoint tensors of these shapes (one for each part).
    ///
    /// # Errors
    /// Shapes that the operations do not fit.
    pub(crate) fn assemble(&self, shapes: &[Vec<u64>]) -> Result<Vec<AssembledTensor>, OpError> {
        assemble(&self.ops, shapes)
    }

    /// Shape of every part, from the shapes of the layout's tensors.
    ///
    /// # Errors
    /// Shapes that no parts give.
    pub(crate) fn part_shape(&self, layout_shapes: &[Vec<u64>]) -> Result<Vec<u64>, OpError> {
        disassembled_shape(&self.ops, self.hf.len(), layout_shapes)
    }
}

/// What a layout's table does with a name.
#[derive(Debug)]
pub(crate) enum RuleMatch<'a> {
    /// A rule takes it.
    Map {
        /// Position of the rule in the table.
        row: usize,
        /// The rule.
        rule: &'a Rule,
        /// Which of the rule's names on that side it is.
        part: usize,
        /// What the name bound; the stacked variable is unbound in the second form.
        bindings: Bindings,
    },
    /// It is left out.
    Drop {
        /// Why.
        reason: &'a str,
    },
}

/// A layout's table.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Which layout.
    pub name: LayoutName,
    /// Its lines; the first that takes a name decides.
    pub rows: Vec<TableRow>,
    /// Whether every floating-point tensor has the output dtype, BF16 where F32 was asked for.
    pub cast_floats: bool,
}

impl Layout {
    /// What becomes of a checkpoint tensor; `None` where no rule names it.
    pub(crate) fn match_hf(&self, name: &str) -> Option<RuleMatch<'_>> {
        self.take(name, |rule| rule.names(Side::Hf), |hf, _| hf)
    }

    /// What becomes of a tensor of the layout; `None` where no rule names it.
    pub(crate) fn match_to(&self, name: &str) -> Option<RuleMatch<'_>> {
        self.take(name, |rule| rule.names(Side::To), |_, to| to)
    }

    /// As [`Layout::match_to`], by a rule that else only reads the checkpoint's names, where those
    /// are the ones that `published` knows.
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

    /// The layout's names of a checkpoint tensor: what it becomes, or a part of.
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

    /// Whether a rule names a tensor of either side without `{r}`: more certain of what it is than
    /// any template that takes names by their ends.
    pub(crate) fn names_exactly(&self, name: &str) -> bool {
        self.rows.iter().any(|row| match row {
            TableRow::Map(rule) => {
                let mut names = rule.hf.iter().chain(&rule.to).filter(|t| !t.has_rest());
                names.any(|t| t.bind(name, &rule.vars).is_some())
            }
            TableRow::Drop { .. } => false,
        })
    }

    /// Refuses a rule all of whose names on a side an earlier rule takes: it would never be used
    /// in that direction, and the other rule would give its tensors other names.
    pub(super) fn refuse_unreachable(&self) -> Result<(), MappingError> {
        // Samples of what a rule takes: the ends of each index's range, and a rest that no
        // literal of another rule is likely to be.
        let last = |bound: Option<u64>| bound.map_or(u64::MAX / 4, |b| b.saturating_sub(1));
        for (at, row) in self.rows.iter().enumerate() {
            let (vars, text) = match row {
                TableRow::Map(rule) => (&rule.vars, &rule.text),
                TableRow::Drop { vars, text, .. } => (vars, text),
            };
            let ends =
                [Bindings::sample(vars, |_| 0, "\u{1}"), Bindings::sample(vars, last, "\u{1}")];
            // A layer that a config.json gives to a rule that drops is no mistake of the mapping.
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
                let taken = |name: String| earlier().any(|r| r.takes(side, &name));
                let unbound = samples.clone().next().is_none();
                if !unbound && samples.all(taken) {
                    return Err(MappingError::rule(text, why));
                }
            }
        }
        Ok(())
    }
}
