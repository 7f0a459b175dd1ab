//! The keys of a mapping file as serde structs: syntax only. `file.rs` checks them and looks up
//! config keys. The module's page documents every key.

use std::collections::BTreeMap;

use serde::Deserialize;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct RawMapping {
    pub(super) name: String,
    pub(super) title: String,
    #[serde(default)]
    pub(super) model_types: Vec<String>,
    #[serde(default)]
    pub(super) alias: Vec<RawAlias>,
    #[serde(default)]
    pub(super) encoding: Vec<RawEncoding>,
    pub(super) native: Option<RawLayout>,
    pub(super) transformers: Option<RawLayout>,
    pub(super) quantization: Option<OneOrMany<RawQuantization>>,
    #[serde(default)]
    pub(super) published_plain: bool,
    #[serde(default)]
    pub(super) require: Vec<RawRequirement>,
    #[serde(default)]
    pub(super) siblings: Vec<RawSiblings>,
    #[serde(default)]
    pub(super) set: BTreeMap<String, Vec<RawRule>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAlias {
    pub(super) from: String,
    pub(super) to: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct RawEncoding {
    pub(super) scheme: String,
    pub(super) matrix: OneOrMany<String>,
    pub(super) payload: Option<OneOrMany<String>>,
    /// One name, or several spellings; with `fused-shards` a name or spellings for each of the two
    /// matrices.
    pub(super) scale: OneOrMany<OneOrMany<String>>,
    pub(super) shape: Option<String>,
    pub(super) block: [u64; 2],
    #[serde(default)]
    pub(super) fused_shards: bool,
    #[serde(default)]
    pub(super) transposed: bool,
    #[serde(default)]
    pub(super) quantizes: Vec<String>,
    pub(super) scale_dtype: Option<String>,
    pub(super) shards: Option<String>,
    pub(super) when: Option<RawWhen>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct RawWhen {
    pub(super) key: String,
    pub(super) is: Option<String>,
    pub(super) is_not: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct RawRequirement {
    pub(super) scope: Option<OneOrMany<String>>,
    pub(super) names: Option<OneOrMany<String>>,
    #[serde(default)]
    pub(super) one_of: Vec<Vec<String>>,
    pub(super) beside: Option<String>,
    pub(super) when: Option<RawWhen>,
    pub(super) unless: Option<OneOrMany<String>>,
    pub(super) layers: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct RawSiblings {
    pub(super) scope: OneOrMany<String>,
    #[serde(default)]
    pub(super) may_lack: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawQuantization {
    pub(super) within: Option<String>,
    pub(super) unquantized: Option<String>,
    pub(super) scheme: Option<String>,
    pub(super) value: serde_json::Value,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct RawLayout {
    #[serde(default)]
    pub(super) cast_floats: bool,
    #[serde(default)]
    pub(super) rule: Vec<RawRule>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct RawRule {
    pub(super) hf: Option<OneOrMany<String>>,
    pub(super) to: Option<OneOrMany<String>>,
    pub(super) same: Option<OneOrMany<String>>,
    #[serde(default)]
    pub(super) ops: Vec<RawOp>,
    #[serde(default)]
    pub(super) grouped: bool,
    #[serde(default)]
    pub(super) expert_axis: bool,
    pub(super) hf_shape: Option<Vec<String>>,
    pub(super) hf_dtype: Option<String>,
    pub(super) piece_shape: Option<Vec<String>>,
    pub(super) reads: Option<RawSide>,
    pub(super) drop: Option<String>,
    pub(super) unless: Option<String>,
    pub(super) scope: Option<RawScope>,
    #[serde(rename = "use")]
    pub(super) set: Option<String>,
}

impl RawRule {
    /// All names of the rule, in the order of their keys.
    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        [&self.hf, &self.to, &self.same].into_iter().flatten().flat_map(OneOrMany::as_slice)
    }

    /// Whether it has a key that only a rule with names can have.
    pub(super) fn has_value_keys(&self) -> bool {
        !self.ops.is_empty()
            || self.grouped
            || self.expert_axis
            || self.reads.is_some()
            || self.hf_shape.is_some()
            || self.hf_dtype.is_some()
            || self.piece_shape.is_some()
    }
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RawSide {
    Hf,
    To,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawScope {
    pub(super) hf: String,
    pub(super) to: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub(super) fn as_slice(&self) -> &[T] {
        match self {
            OneOrMany::One(one) => std::slice::from_ref(one),
            OneOrMany::Many(many) => many,
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum RawOp {
    Word(RawWord),
    Concat(RawConcat),
    Interleave(RawInterleave),
    Split(RawSplit),
    Rotary(RawRotary),
    Stack(RawStack),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RawWord {
    Transpose,
}

macro_rules! raw_op {
    ($name:ident { $($field:ident : $type:ty),+ }) => {
        #[derive(Clone, Debug, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub(super) struct $name { $(pub(super) $field: $type),+ }
    };
}
raw_op!(RawConcat { concat: usize });
raw_op!(RawInterleave { interleave: usize });
raw_op!(RawSplit { split: usize });
raw_op!(RawRotary { rotary: usize, heads: String, of: Vec<usize> });
raw_op!(RawStack { stack: String });
