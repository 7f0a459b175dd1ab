//! The closed sets of words that options take.

use clap::ValueEnum;
use std::fmt;

macro_rules! print_as_typed {
    ($($choice:ty),*) => {$(
        impl fmt::Display for $choice {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // No variant is skipped, so each has its word.
                self.to_possible_value().map_or(Ok(()), |word| f.write_str(word.get_name()))
            }
        }
    )*};
}

print_as_typed!(
    LayoutChoice,
    FloatChoice,
    ScaleFloatChoice,
    QuantizeChoice,
    KvScalesChoice,
    UnmappedChoice,
    LogFormat
);

/// `--to`: how the view names and groups its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LayoutChoice {
    /// As training in NeMo Automodel has it: grouped experts, `[in, out]`
    Native,
    /// As transformers v5 has it in memory: grouped experts, `[out, in]`
    Transformers,
    /// As published: one tensor for each expert and projection
    Hf,
}

/// `--dtype`: what quantized and grouped tensors become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FloatChoice {
    /// Brain float, 16 bits
    Bf16,
    /// IEEE half, 16 bits; values above 65504 become infinite
    F16,
    /// IEEE single, 32 bits: exact, twice the size
    F32,
}

/// `--scale-dtype`: what the scales of INT4 weights are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScaleFloatChoice {
    /// As in published checkpoints
    Bf16,
    /// As NeMo Automodel writes them
    F16,
}

/// `--quantize`: what the weights of an hf view are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum QuantizeChoice {
    /// Plain floats
    None,
    /// The model's own scheme: FP8, FP4 or INT4, with scales
    Checkpoint,
}

/// `--kv-scales`: which scale rows serve the K and V rows of MiMo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvScalesChoice {
    /// K and V rows of a shard share one block grid, as they were quantized
    Fused,
    /// A plain grid, as NeMo Automodel 0.7.0 reads split K and V
    Automodel,
}

/// `--unmapped`: what becomes of source tensors that no rule names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum UnmappedChoice {
    /// An error that names them
    Refuse,
    /// Their own name, their own bytes
    Keep,
    /// Left out of the view
    Drop,
}

/// `--log-format`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line for people
    Text,
    /// One JSON object a line
    Json,
}

/// `--log-level`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// What went wrong
    Error,
    /// And what looks wrong
    Warn,
    /// And mount, summary, unmount
    Info,
    /// And what the kernel and the planner agreed on
    Debug,
    /// And every request
    Trace,
}
