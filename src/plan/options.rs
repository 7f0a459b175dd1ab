//! Options of a plan: what the user asks for.

use std::sync::Arc;

use regex::Regex;

use super::{ExpertParallel, ExpertShard, ScaleReading};
use crate::mapping::LayoutName;
use crate::source::Checkpoint;
use crate::tensor::Float;

/// Options of a plan.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// Layout of the view; `None`: `native` for an hf checkpoint, `hf` for any other.
    pub to: Option<LayoutName>,
    /// Dtype of dequantized and grouped tensors in the view.
    pub dtype: Float,
    /// How to read the scales of fused shards.
    pub scale_reading: ScaleReading,
    /// What to do with tensors that no rule names.
    pub unmapped: Unmapped,
    /// Names of tensors and layers that may be missing although the model needs them.
    pub allow_missing: Vec<Regex>,
    /// Show only tensors whose names match one of these; all if the list is empty.
    pub include: Vec<Regex>,
    /// Leave out tensors whose names match one of these.
    pub exclude: Vec<Regex>,
    /// Distributes the experts (axis 0 of grouped tensors) over ranks.
    pub expert_parallel: Option<ExpertParallel>,
    /// Distributes axis 1 of grouped tensors over ranks.
    pub expert_shard: Option<ExpertShard>,
    /// With layout `hf`: quantize as the published checkpoints are; `None`: plain tensors.
    pub quantize: Option<Quantize>,
}

/// How to quantize the matrices of an `hf` view.
#[derive(Clone, Debug, Default)]
pub struct Quantize {
    /// Take the scales, and the choice of matrices to quantize, from this checkpoint.
    pub original: Option<Arc<Checkpoint>>,
    /// Dtype of computed INT4 scales; BF16 by default.
    pub scale_dtype: Option<Float>,
}

impl Default for PlanOptions {
    fn default() -> PlanOptions {
        PlanOptions {
            to: None,
            dtype: Float::BF16,
            scale_reading: ScaleReading::default(),
            unmapped: Unmapped::default(),
            allow_missing: Vec::new(),
            include: Vec::new(),
            exclude: Vec::new(),
            expert_parallel: None,
            expert_shard: None,
            quantize: None,
        }
    }
}

/// What to do with source tensors that no rule names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unmapped {
    /// Refuse the mount.
    #[default]
    Refuse,
    /// Show them under their own names.
    Keep,
    /// Leave them out.
    Drop,
}

impl PlanOptions {
    /// Whether `include` and `exclude` select a tensor; both match from the start of its name.
    pub(crate) fn selects(&self, name: &str) -> bool {
        let included = self.include.is_empty() || matches(&self.include, name);
        included && !matches(&self.exclude, name)
    }
}

/// Whether one of the patterns matches at the start of the name.
pub(super) fn matches(patterns: &[Regex], name: &str) -> bool {
    patterns.iter().any(|re| re.find(name).is_some_and(|m| m.start() == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_match_from_the_start() {
        let re = |t| vec![Regex::new(t).unwrap()];
        let options = |include, exclude| PlanOptions { include, exclude, ..PlanOptions::default() };
        assert!(options(vec![], re("mtp")).selects("model.mtp.x"));
        assert!(!options(vec![], re(".*mtp")).selects("model.mtp.x"));
        assert!(options(re("model"), vec![]).selects("model.x"));
        assert!(!options(re("model"), vec![]).selects("lm_head.x"));
    }
}
