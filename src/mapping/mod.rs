//! What a model's tensors are called and how they are laid out: names and operations, as data.
//!
//! A mapping is a TOML file (`models/*.toml` are embedded, `--mapping FILE` adds one's own). Its
//! rules tie the names of the published checkpoint to those of a layout, both ways. Nothing here
//! opens a checkpoint; integers of config.json come in through a look-up.

mod file;
mod layout;
mod op;
mod raw;
mod require;
mod template;

pub(crate) use layout::{
    Encoding, Layout, QuantizationConfig, ResolvedMapping, Rule, RuleMatch, Side, TableRow,
};
pub(crate) use op::{AssembledTensor, Op};
pub(crate) use require::{RequiredName, Requirement, Scope};
pub(crate) use template::{Bindings, NameTemplate};

pub use file::{Mapping, ModelName, shipped};
pub use layout::LayoutName;

/// What config.json says at a (dotted) key; a null is as good as an absent key.
pub(crate) type ConfigLookup<'a> = dyn Fn(&str) -> Option<serde_json::Value> + 'a;

/// Why a mapping cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The file is no TOML, or has keys that a mapping does not have.
    #[error("mapping `{name}`: {source}")]
    Syntax {
        /// The mapping's file or name.
        name: String,
        /// What the TOML parser says, with the line.
        source: Box<toml::de::Error>,
    },
    /// The file cannot be read.
    #[error("mapping `{path}`: {source}")]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A name template that makes no sense.
    #[error("template `{template}`: {why}")]
    Template {
        /// The template.
        template: String,
        /// What is wrong with it.
        why: String,
    },
    /// A rule that makes no sense.
    #[error("rule `{rule}`: {why}")]
    Rule {
        /// The rule's first name.
        rule: String,
        /// What is wrong with it.
        why: String,
    },
    /// config.json lacks an integer.
    #[error("config.json has no integer `{key}`, which the mapping needs")]
    MissingConfigKey {
        /// The key.
        key: String,
    },
    /// A layout that the mapping does not describe.
    #[error("the mapping `{mapping}` has no `{layout}` layout; it has: {}", known.join(", "))]
    NoLayout {
        /// The mapping.
        mapping: String,
        /// The layout that was asked for.
        layout: LayoutName,
        /// The layouts that it has.
        known: Vec<String>,
    },
    /// No mapping of this name.
    #[error("unknown model `{name}`; known: {}", known.join(", "))]
    UnknownModel {
        /// The name that was asked for.
        name: String,
        /// The shipped mappings.
        known: Vec<String>,
    },
    /// No mapping for this `model_type`.
    #[error(
        "no mapping for the checkpoint's model_type {}; known: {}",
        if found.is_empty() { "(config.json has none)".to_owned() } else { format!("`{}`", found.join("`, `")) },
        known.join(", ")
    )]
    UnknownModelType {
        /// What config.json says, outermost first.
        found: Vec<String>,
        /// The model types of the shipped mappings.
        known: Vec<String>,
    },
}

impl MappingError {
    fn template(template: &str, why: impl Into<String>) -> MappingError {
        MappingError::Template { template: template.to_owned(), why: why.into() }
    }

    fn rule(rule: impl Into<String>, why: impl Into<String>) -> MappingError {
        MappingError::Rule { rule: rule.into(), why: why.into() }
    }
}
