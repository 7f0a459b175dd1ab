//! Problems that planning finds, collected into one error: each kind with its count and first
//! names.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::mapping::{LayoutName, MappingError};
use crate::source::ConfigError;
use crate::tensor::to_u64;

/// Maximum number of names per kind that a message lists.
const MAX_LISTED: usize = 5;

/// A kind of problem. The order here is the order in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Problem {
    /// A tensor or config key of a quantization that no decoder here supports.
    Unsupported,
    /// A source tensor that no rule of the mapping names.
    NoRule,
    /// A layer without any tensor, although config.json counts it.
    MissingLayer,
    /// A tensor that a rule needs together with one that is there.
    MissingPart,
    /// A tensor that the mapping requires, or that other layers of its kind have.
    Incomplete,
    /// A tensor whose pieces leave gaps, overlap, or differ.
    Pieces,
    /// A quantized payload without its scale.
    MissingScale,
    /// A scale or shape tensor without its payload.
    MissingPayload,
    /// A payload of a dtype that the scheme does not have.
    PayloadDtype,
    /// A payload whose shape is none of a matrix.
    PayloadShape,
    /// A scale whose shape does not fit the shape of the payload.
    ScaleShape,
    /// A scale of a dtype that the scheme does not have.
    ScaleDtype,
    /// A `weight_shape` tensor that cannot hold two extents.
    ShapeTensor,
    /// Tensors of a rule whose shapes do not fit together.
    RuleShape,
    /// Tensors of a rule whose dtypes cannot be cast, or differ where they are not cast.
    RuleDtype,
    /// Two source tensors that get the same name.
    SameName,
    /// A tensor that would have more fragments than any model needs.
    TooManyFragments,
    /// A tensor whose size in bytes exceeds 64 bits or is no whole number.
    Size,
    /// A tensor that cannot be divided among the ranks.
    Indivisible,
}

impl Problem {
    fn heading(self, one: bool) -> &'static str {
        match (self, one) {
            (Problem::NoRule, true) => "tensor that no rule of the mapping takes",
            (Problem::NoRule, false) => "tensors that no rule of the mapping takes",
            (Problem::MissingLayer, true) => "missing layer",
            (Problem::MissingLayer, false) => "missing layers",
            (Problem::MissingPart, true) => "missing tensor",
            (Problem::MissingPart, false) => "missing tensors",
            (Problem::Incomplete, true) => "missing tensor that the model needs",
            (Problem::Incomplete, false) => "missing tensors that the model needs",
            (Problem::Pieces, true) => "tensor whose pieces make no whole",
            (Problem::Pieces, false) => "tensors whose pieces make no whole_tensors",
            (Problem::MissingScale, true) => "missing scale",
            (Problem::MissingScale, false) => "missing scales",
            (Problem::MissingPayload, true) => "part of a quantized matrix without its payload",
            (Problem::MissingPayload, false) => {
                "parts of quantized matrices without their payloads"
            }
            (Problem::PayloadDtype, true) => "payload of an impossible dtype",
            (Problem::PayloadDtype, false) => "payloads of impossible dtypes",
            (Problem::PayloadShape, true) => "payload of an impossible shape",
            (Problem::PayloadShape, false) => "payloads of impossible shapes",
            (Problem::ScaleShape, true) => "scale of an impossible shape",
            (Problem::ScaleShape, false) => "scales of impossible shapes",
            (Problem::ScaleDtype, true) => "scale of an impossible dtype",
            (Problem::ScaleDtype, false) => "scales of impossible dtypes",
            (Problem::ShapeTensor, true) => "shape tensor that holds no two integers",
            (Problem::ShapeTensor, false) => "shape tensors that hold no two integers",
            (Problem::Unsupported, true) => "part of a quantization that is not supported",
            (Problem::Unsupported, false) => "parts of a quantization that is not supported",
            (Problem::RuleShape, true) => "tensor whose shape does not fit its rule",
            (Problem::RuleShape, false) => "tensors whose shapes do not fit their rules",
            (Problem::RuleDtype, true) => "tensor whose dtype does not fit its rule",
            (Problem::RuleDtype, false) => "tensors whose dtypes do not fit their rules",
            (Problem::SameName, true) => "name that two tensors land on",
            (Problem::SameName, false) => "names that two tensors land on",
            (Problem::TooManyFragments, true) => "tensor of more pieces than any model's",
            (Problem::TooManyFragments, false) => "tensors of more pieces than any model's",
            (Problem::Size, true) => "tensor of an impossible size",
            (Problem::Size, false) => "tensors of impossible sizes",
            (Problem::Indivisible, true) => "tensor that the expert-parallel cut does not divide",
            (Problem::Indivisible, false) => "tensors that the expert-parallel cut does not divide",
        }
    }
}

/// The problems found so far; [`Problems::finish`] turns them into an error.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Problems {
    found: BTreeMap<Problem, Occurrences>,
    /// Matrices of which a part was refused.
    refused: BTreeSet<String>,
    /// Tensors that were reported as missing.
    missing: BTreeSet<String>,
}

/// How many objects have a problem, and the first few of them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Occurrences {
    count: u64,
    first: Vec<String>,
}

impl Problems {
    /// Notes that `name` has the problem.
    pub fn add(&mut self, problem: Problem, name: &str) {
        self.note(problem, || format!("`{name}`"));
    }

    /// Notes that `name` has the problem, with a detail.
    pub fn explain(&mut self, problem: Problem, name: &str, what: impl fmt::Display) {
        self.note(problem, || format!("`{name}` ({what})"));
    }

    fn note(&mut self, problem: Problem, text: impl FnOnce() -> String) {
        let found = self.found.entry(problem).or_default();
        found.count = found.count.saturating_add(1);
        if found.first.len() < MAX_LISTED {
            found.first.push(text());
        }
    }

    /// Notes `count` objects with the problem; `first` yields them as (name, detail). Only the
    /// first few are taken, because a config.json can ask for any number of tensors.
    pub fn add_many(
        &mut self,
        problem: Problem,
        count: u64,
        first: impl Iterator<Item = (String, String)>,
    ) {
        if count == 0 {
            return;
        }
        let found = self.found.entry(problem).or_default();
        found.count = found.count.saturating_add(count);
        let room = MAX_LISTED - found.first.len();
        let shown = usize::try_from(count).map_or(room, |n| n.min(room));
        found.first.extend(first.take(shown).map(|(name, what)| format!("`{name}` ({what})")));
    }

    /// Remembers that a part of the matrix `name` was refused, so that the matrix is not reported
    /// as missing too.
    pub fn mark_refused(&mut self, name: String) {
        self.refused.insert(name);
    }

    /// Whether a part of the matrix `name` was refused.
    pub fn is_refused(&self, name: &str) -> bool {
        self.refused.contains(name)
    }

    /// Remembers that the tensor `name`, or a part of it, was reported as missing.
    pub fn mark_missing(&mut self, name: &str) {
        self.missing.insert(name.to_owned());
    }

    /// Whether the tensor `name` was already refused or reported as missing.
    pub fn is_reported(&self, name: &str) -> bool {
        self.refused.contains(name) || self.missing.contains(name)
    }

    /// Whether this problem was noted.
    pub fn has(&self, problem: Problem) -> bool {
        self.found.contains_key(&problem)
    }

    /// Succeeds if no problem was noted.
    ///
    /// # Errors
    /// All noted problems.
    pub fn finish(self) -> Result<(), PlanError> {
        if self.found.is_empty() { Ok(()) } else { Err(PlanError::Refused(self)) }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (problem, Occurrences { count, first })) in self.found.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{count} {}: {}", problem.heading(*count == 1), first.join(", "))?;
            let listed = to_u64(first.len());
            if *count > listed {
                write!(f, " and {} more", count - listed)?;
            }
        }
        Ok(())
    }
}

/// Why a checkpoint cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The mapping does not fit the checkpoint's config, or lacks the layout.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// A value in config.json has the wrong type.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Tensors that cannot be served.
    #[error("{0}")]
    Refused(Problems),
    /// The names of the checkpoint fit no layout of the mapping.
    #[error(
        "the checkpoint's names fit no layout of `{model}`: none of its {tensors} tensors is one \
         that the mapping renames or groups"
    )]
    UnknownLayout {
        /// The mapping.
        model: String,
        /// Tensors of the checkpoint.
        tensors: usize,
    },
    /// `include` and `exclude` of [`crate::plan::PlanOptions`] select no tensor.
    #[error("the view is empty: no tensor's name passes the filters")]
    Empty,
    /// `expert_parallel` or `expert_shard` for a layout without grouped experts.
    #[error(
        "expert-parallel ranks cut grouped experts, which the layout `{0}` does not have: take \
         `native` or `transformers`"
    )]
    NoGroupedExperts(LayoutName),
    /// `quantize` for a layout other than `hf`.
    #[error("the layout `{0}` cannot be quantized, `hf` alone can")]
    QuantizedLayout(LayoutName),
    /// `quantize` without an original, and the mapping does not describe the quantization.
    #[error("the mapping `{mapping}` does not say {lacks}: take it from the original checkpoint")]
    UnknownQuantization {
        /// The mapping.
        mapping: String,
        /// What the mapping does not say.
        lacks: &'static str,
    },
    /// More tensors than a plan can number.
    #[error("the view has more tensors than 32 bits can number")]
    TooMany,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_may_exceed_the_listed_names() {
        let mut problems = Problems::default();
        let names = (0..).map(|i| (format!("w{i}"), "for `x`".to_owned()));
        problems.add_many(Problem::MissingPart, 1 << 60, names.clone());
        assert_eq!(
            problems.to_string(),
            "1152921504606846976 missing tensors: `w0` (for `x`), `w1` (for `x`), `w2` (for `x`), \
             `w3` (for `x`), `w4` (for `x`) and 1152921504606846971 more"
        );
        let mut none = Problems::default();
        none.add_many(Problem::MissingPart, 0, names);
        assert!(none.finish().is_ok());
    }

    #[test]
    fn problems_show_a_count_and_five_names() {
        let mut problems = Problems::default();
        for i in 0..7 {
            problems.add(Problem::MissingScale, &format!("w{i}.scale"));
        }
        problems.explain(Problem::ScaleShape, "x", "expected [2, 2], got [1]");
        assert_eq!(
            problems.to_string(),
            "7 missing scales: `w0.scale`, `w1.scale`, `w2.scale`, `w3.scale`, `w4.scale` and 2 \
             more; 1 scale of an impossible shape: `x` (expected [2, 2], got [1])"
        );
        assert!(Problems::default().finish().is_ok());
        assert!(problems.finish().is_err());
    }
}
