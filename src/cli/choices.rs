//! The words that options take, each with the value that it stands for.

use crate::mapping::LayoutName;
use crate::plan::{ScaleReading, Unmapped};
use crate::tensor::Float;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use tracing::Level;

/// A word, its value, and a line of help.
type Choice<T> = (&'static str, T, &'static str);

/// A parser that takes one of `choices`.
pub(super) fn one_of<T>(choices: &'static [Choice<T>]) -> impl TypedValueParser<Value = T>
where
    T: Copy + Send + Sync + 'static,
{
    let words = choices.iter().map(|(word, _, help)| PossibleValue::new(*word).help(*help));
    PossibleValuesParser::new(words).map(|typed| {
        let choice = choices.iter().find(|(word, ..)| *word == typed);
        choice.expect("clap accepts the words of the list only").1
    })
}

/// `--to`: names and grouping of the view's tensors.
pub(super) const LAYOUTS: &[Choice<LayoutName>] = &[
    ("native", LayoutName::Native, "NeMo Automodel's: grouped experts, [in, out]"),
    (
        "transformers",
        LayoutName::Transformers,
        "transformers v5's in memory: grouped experts, [out, in]",
    ),
    ("hf", LayoutName::Hf, "As published, most often one tensor for each expert and projection"),
];

/// `--dtype`: dtype of quantized and grouped tensors.
pub(super) const DTYPES: &[Choice<Float>] = &[
    ("bf16", Float::BF16, "Brain float, 16 bits"),
    ("f16", Float::F16, "IEEE half, 16 bits; values above 65504 become infinite"),
    ("f32", Float::F32, "IEEE single, 32 bits: exact, twice the size"),
];

/// `--scale-dtype`: dtype of the scales of INT4 weights.
pub(super) const SCALE_DTYPES: &[Choice<Float>] = &[
    ("bf16", Float::BF16, "As in published checkpoints"),
    ("f16", Float::F16, "As NeMo Automodel writes them"),
];

/// `--quantize`: whether the weights of an hf view are quantized.
pub(super) const QUANTIZE: &[Choice<bool>] = &[
    ("none", false, "Plain floats"),
    ("checkpoint", true, "The model's own scheme: FP8, FP4 or INT4, with scales"),
];

/// `--kv-scales`: which scale rows serve the K and V rows of MiMo.
pub(super) const KV_SCALES: &[Choice<ScaleReading>] = &[
    (
        "fused",
        ScaleReading::Fused,
        "K and V rows of a shard share one block grid, as they were quantized",
    ),
    (
        "automodel",
        ScaleReading::Automodel,
        "A plain grid, as NeMo Automodel 0.7.0 reads split K and V",
    ),
];

/// `--unmapped`: what happens to source tensors that no rule names.
pub(super) const UNMAPPED: &[Choice<Unmapped>] = &[
    ("refuse", Unmapped::Refuse, "An error that names them"),
    ("keep", Unmapped::Keep, "Shown under their own names, byte for byte"),
    ("drop", Unmapped::Drop, "Left out of the view"),
];

/// `--log-format`: whether a line is a JSON object.
pub(super) const LOG_FORMATS: &[Choice<bool>] =
    &[("text", false, "One line for people"), ("json", true, "One JSON object a line")];

/// `--log-level`: the least severe events that are logged.
pub(super) const LOG_LEVELS: &[Choice<Level>] = &[
    ("error", Level::ERROR, "Failures"),
    ("warn", Level::WARN, "And what looks wrong"),
    ("info", Level::INFO, "And mount, summary, unmount"),
    ("debug", Level::DEBUG, "And what the kernel and the planner agreed on"),
    ("trace", Level::TRACE, "And every request"),
];
