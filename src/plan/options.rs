//! What a user asks of a view.

use std::sync::Arc;

use regex::Regex;

use super::{ExpertParallel, ExpertShard, ScaleReading};
use crate::mapping::LayoutName;
use crate::source::Checkpoint;
use crate::tensor::Float;

/// What the user asks of a view.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// Layout of the view; `None`: `native` of an hf checkpoint, `hf` of any other.
    pub to: Option<LayoutName>,
    /// What quantized and grouped tensors become.
    pub dtype: Float,
    /// How scales of fused shards are read.
    pub scale_reading: ScaleReading,
    /// What becomes of tensors that no rule names.
    pub unmapped: Unmapped,
    /// Tensors and layers that the model needs and that may be missing all the same.
    pub allow_missing: Vec<Regex>,
    /// Only tensors whose names match one of these; all where there are none.
    pub include: Vec<Regex>,
    /// No tensors whose names match one of these.
    pub exclude: Vec<Regex>,
    /// Ranks that share the experts.
    pub expert_parallel: Option<ExpertParallel>,
    /// Ranks that share axis 1 of grouped tensors.
    pub expert_shard: Option<ExpertShard>,
    /// With layout `hf`: quantize as the model's checkpoints are; `None` leaves numbers as they are.
    pub quantize: Option<Quantize>,
}

/// How matrices are quantized on the way back.
#[derive(Clone, Debug, Default)]
pub struct Quantize {
    /// Scales come from this checkpoint, and so does which matrices are quantized.
    pub original: Option<Arc<Checkpoint>>,
    /// What INT4 scales are stored as; BF16 where nothing is said.
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

/// What becomes of source tensors that no rule names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unmapped {
    /// The mount is refused.
    #[default]
    Refuse,
    /// They are shown under their own names, as they are.
    Keep,
    /// They are left out.
    Drop,
}

impl PlanOptions {
    /// Whether `include` and `exclude` leave a tensor of this name; both match from its start.
    pub(crate) fn selects(&self, name: &str) -> bool {
        let included = self.include.is_empty() || matches(&self.include, name);
        included && !matches(&self.exclude, name)
    }
}

/// Whether one of the patterns matches the name from its start.
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
