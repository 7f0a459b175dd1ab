#![doc = include_str!("README.md")]

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

/// The value of config.json at a key such as `a.b`; `None` where it is absent or null.
pub(crate) type ConfigLookup<'a> = dyn Fn(&str) -> Option<serde_json::Value> + 'a;

/// Why a mapping cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The file is not TOML, or has keys that the mapping language does not have.
    #[error("mapping `{name}`: {source}")]
    Syntax {
        /// The mapping's file or name.
        name: String,
        /// Error of the TOML parser, with the line.
        source: Box<toml::de::Error>,
    },
    /// The file cannot be read.
    #[error("mapping `{path}`: {source}")]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// Error of the system.
        source: std::io::Error,
    },
    /// An invalid name template or config key.
    #[error("template `{template}`: {why}")]
    Template {
        /// The template.
        template: String,
        /// What is wrong with it.
        why: String,
    },
    /// An invalid rule, encoding, requirement or set.
    #[error("rule `{rule}`: {why}")]
    Rule {
        /// The rule's first name.
        rule: String,
        /// What is wrong with it.
        why: String,
    },
    /// config.json lacks an integer that the mapping needs and has no default for.
    #[error("config.json has no integer `{key}`, which the mapping needs")]
    MissingConfigKey {
        /// The key.
        key: String,
    },
    /// The mapping does not describe the layout that was asked for.
    #[error("the mapping `{mapping}` has no `{layout}` layout; it has: {}", known.join(", "))]
    NoLayout {
        /// The mapping.
        mapping: String,
        /// The layout that was asked for.
        layout: LayoutName,
        /// The layouts that it describes, `hf` first.
        known: Vec<String>,
    },
    /// No built-in mapping has this name.
    #[error("unknown model `{name}`; known: {}", known.join(", "))]
    UnknownModel {
        /// The name that was asked for.
        name: String,
        /// Names of the built-in mappings.
        known: Vec<String>,
    },
    /// No built-in mapping is for this `model_type`.
    #[error(
        "no mapping for the checkpoint's model_type {}; known: {}",
        if found.is_empty() { "(config.json has none)".to_owned() } else { format!("`{}`", found.join("`, `")) },
        known.join(", ")
    )]
    UnknownModelType {
        /// Values of `model_type` in config.json, outermost object first.
        found: Vec<String>,
        /// The model types of the built-in mappings.
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
