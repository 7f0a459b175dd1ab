//! The values of options that take one of a few words: each word, its value in code, and its help text.

use crate::mapping::LayoutName;
use crate::plan::{ScaleReading, Unmapped};
use crate::tensor::Float;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use tracing::Level;

/// A word of the command line, its value, and its line of help.
type Choice<T> = (&'static str, T, &'static str);

/// A clap parser that accepts the words of `choices`.
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

/// `--to`: the layout, that is names and grouping, of the view's tensors.
pub(super) const LAYOUTS: &[Choice<LayoutName>] = &[
    ("native", LayoutName::Native, "As in NeMo Automodel: grouped experts, each matrix [in, out]"),
    (
        "transformers",
        LayoutName::Transformers,
        "As in transformers 5 in memory: grouped experts, each matrix [out, in]",
    ),
    ("hf", LayoutName::Hf, "As published: usually one tensor per expert and projection"),
];

/// `--dtype`: dtype of quantized and grouped tensors.
pub(super) const DTYPES: &[Choice<Float>] = &[
    ("bf16", Float::BF16, "bfloat16: the range of F32, 8 bits of precision"),
    ("f16", Float::F16, "IEEE half precision; values above 65504 become infinite"),
    ("f32", Float::F32, "IEEE single precision: exact, twice the size"),
];

/// `--scale-dtype`: dtype of the scales of INT4 weights.
pub(super) const SCALE_DTYPES: &[Choice<Float>] = &[
    ("bf16", Float::BF16, "As in published checkpoints"),
    ("f16", Float::F16, "As NeMo Automodel writes them"),
];

/// `--quantize`: whether the weights of a view in layout `hf` are quantized.
pub(super) const QUANTIZE: &[Choice<bool>] = &[
    ("none", false, "Not quantized"),
    ("checkpoint", true, "The scheme of the published model: FP8, FP4 or INT4, with scales"),
];

/// `--kv-scales`: which rows of scales belong to which rows of K and V in MiMo.
pub(super) const KV_SCALES: &[Choice<ScaleReading>] = &[
    (
        "fused",
        ScaleReading::Fused,
        "K and V rows of a tensor-parallel shard share one grid of blocks: how they were quantized",
    ),
    (
        "automodel",
        ScaleReading::Automodel,
        "K and V have separate grids: how NeMo Automodel 0.7.0 reads them",
    ),
];

/// `--unmapped`: what happens to source tensors that no rule of the mapping matches.
pub(super) const UNMAPPED: &[Choice<Unmapped>] = &[
    ("refuse", Unmapped::Refuse, "Fail, and name them"),
    ("keep", Unmapped::Keep, "Show them under their own names, unchanged"),
    ("drop", Unmapped::Drop, "Leave them out of the view"),
];

/// `--log-format`: whether lines are JSON objects.
pub(super) const LOG_FORMATS: &[Choice<bool>] =
    &[("text", false, "Plain text"), ("json", true, "One JSON object per line")];

/// `--log-level`: the least severe lines that are logged.
pub(super) const LOG_LEVELS: &[Choice<Level>] = &[
    ("error", Level::ERROR, "Errors, such as a read that failed"),
    ("warn", Level::WARN, "Also warnings, such as files that are left out of the view"),
    ("info", Level::INFO, "Also the mount with its summary, and the unmount"),
    ("debug", Level::DEBUG, "Also what the kernel supports, and every request"),
    ("trace", Level::TRACE, "Everything"),
];
