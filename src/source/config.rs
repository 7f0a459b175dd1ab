//! config.json, with typed look-ups.
//!
//! Vision-language checkpoints keep the language model's settings in `text_config`. A key is
//! looked up at the top level first and in `text_config` second. Other nested objects are not
//! searched: `vision_config` has keys with the same names and other meanings.
//!
//! Python writes `Infinity`, `-Infinity` and `NaN`, which are not JSON. They are parsed as marker
//! strings that no real file contains, and [`Config::write`] writes the constants again.

use std::borrow::Cow;

use serde_json::{Map, Value};

/// A key of config.json that is absent or has a value of the wrong type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("config.json: `{key}`: expected {expected}, got {found}")]
pub struct ConfigError {
    /// The key, with dots between nested keys.
    pub key: String,
    /// What the value should be.
    pub expected: &'static str,
    /// What the value is.
    pub found: String,
}

/// A parsed config.json. Keys keep their order.
#[derive(Debug, Clone)]
pub struct Config {
    raw: Vec<u8>,
    top: Map<String, Value>,
}

impl Config {
    /// Parses the text of a config.json.
    ///
    /// # Errors
    /// If it is not a JSON object.
    pub(crate) fn parse(raw: Vec<u8>) -> Result<Config, serde_json::Error> {
        let top = serde_json::from_slice(&with_quoted_constants(&raw))?;
        Ok(Config { raw, top })
    }

    /// Formats a config.json with these keys: indented by two spaces, with a newline at the end.
    pub(crate) fn write(top: &Map<String, Value>) -> Vec<u8> {
        let mut text = serde_json::to_string_pretty(top).expect("a JSON value can be written");
        for constant in CONSTANTS {
            text = text.replace(&Value::from(quoted(constant)).to_string(), constant);
        }
        text.push('\n');
        text.into_bytes()
    }

    /// The bytes of the file.
    pub(crate) fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// The top-level object.
    pub fn top(&self) -> &Map<String, Value> {
        &self.top
    }

    /// The value at a dotted key such as `num_hidden_layers` or `text_config.num_hidden_layers`.
    /// Looks at the top level first, then in `text_config`. `None` if the key is absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let in_text = || descend(self.top.get("text_config")?.as_object()?, key);
        descend(&self.top, key).or_else(in_text)
    }

    /// The integer at `key`.
    ///
    /// # Errors
    /// If there is no value or it is not a non-negative integer.
    pub fn int(&self, key: &str) -> Result<u64, ConfigError> {
        self.typed(key, "an integer from 0 on", Value::as_u64)
    }

    /// The string at `key`.
    ///
    /// # Errors
    /// If there is no value or it is not a string.
    pub fn string(&self, key: &str) -> Result<&str, ConfigError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// The list of integers at `key`.
    ///
    /// # Errors
    /// If there is no value or it is not a list of non-negative integers.
    pub fn ints(&self, key: &str) -> Result<Vec<u64>, ConfigError> {
        self.typed(key, "a list of integers from 0 on", |value| {
            value.as_array()?.iter().map(Value::as_u64).collect()
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        cast: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T, ConfigError> {
        let value = self.get(key);
        value.and_then(cast).ok_or_else(|| ConfigError {
            key: key.to_owned(),
            expected,
            found: value.map_or("nothing".to_owned(), describe),
        })
    }

    /// The top-level `model_type`.
    pub fn model_type(&self) -> Option<&str> {
        self.top.get("model_type")?.as_str()
    }

    /// All values of `model_type`: that of the top level, then those of its nested objects, in
    /// order.
    pub fn model_types(&self) -> Vec<&str> {
        let nested = self.top.values().filter_map(|v| v.as_object()?.get("model_type")?.as_str());
        self.model_type().into_iter().chain(nested).collect()
    }

    /// The object `quantization_config`, at the top level or in `text_config`.
    pub fn quantization_config(&self) -> Option<&Map<String, Value>> {
        self.get("quantization_config")?.as_object()
    }

    /// Rows and columns of an FP8 scale block, from `quantization_config.weight_block_size`; `None`
    /// if the key is absent.
    ///
    /// # Errors
    /// If it is not a pair of integers above 0.
    pub(crate) fn weight_block_size(&self) -> Result<Option<[u64; 2]>, ConfigError> {
        const KEY: &str = "quantization_config.weight_block_size";
        if self.get(KEY).is_none() {
            return Ok(None);
        }
        let block =
            self.typed(KEY, "two integers above 0", |value| match value.as_array()?.as_slice() {
                [rows, cols] => Some([rows.as_u64()?, cols.as_u64()?]).filter(|b| !b.contains(&0)),
                _ => None,
            })?;
        Ok(Some(block))
    }

    /// Columns that share an INT4 scale, from `quantization_config.config_groups`
    /// (compressed-tensors); `None` if the key is absent or its groups have different sizes.
    ///
    /// # Errors
    /// If a group size is not an integer above 0.
    pub(crate) fn group_size(&self) -> Result<Option<u64>, ConfigError> {
        const GROUPS: &str = "quantization_config.config_groups";
        let groups = self.get(GROUPS).and_then(Value::as_object);
        let mut sizes = Vec::new();
        for name in groups.into_iter().flat_map(Map::keys) {
            let key = format!("{GROUPS}.{name}.weights.group_size");
            // -1 and null mean one scale for each row.
            if self.get(&key).is_some_and(|value| *value != -1) {
                let positive = |value: &Value| value.as_u64().filter(|n| *n > 0);
                sizes.push(self.typed(&key, "an integer above 0", positive)?);
            }
        }
        sizes.dedup();
        Ok(match sizes.as_slice() {
            [size] => Some(*size),
            _ => None,
        })
    }
}

/// Constants that Python's `json` reads and writes although JSON has none; the longest first.
const CONSTANTS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// The marker string for a constant. It starts with U+0000, which no real config.json contains.
fn quoted(constant: &str) -> String {
    format!("\u{0}{constant}")
}

/// Replaces Python's constants outside of strings by marker strings.
fn with_quoted_constants(raw: &[u8]) -> Cow<'_, [u8]> {
    let is_there = |constant: &str| raw.windows(constant.len()).any(|w| w == constant.as_bytes());
    if !CONSTANTS.iter().any(|c| is_there(c)) {
        return Cow::Borrowed(raw);
    }
    let mut out = Vec::with_capacity(raw.len());
    let mut in_string = false;
    let mut left = raw;
    while let Some((&byte, rest)) = left.split_first() {
        let constant = CONSTANTS.iter().find(|c| !in_string && left.starts_with(c.as_bytes()));
        if let Some(constant) = constant {
            out.extend(Value::from(quoted(constant)).to_string().into_bytes());
            left = &left[constant.len()..];
            continue;
        }
        out.push(byte);
        left = rest;
        match (in_string, byte) {
            (true, b'\\') => {
                // An escaped quote does not end the string.
                if let Some((&escaped, rest)) = left.split_first() {
                    out.push(escaped);
                    left = rest;
                }
            }
            (_, b'"') => in_string = !in_string,
            (true | false, _) => {}
        }
    }
    Cow::Owned(out)
}

/// The value at a dotted key below `map`; `None` if it is absent or null.
fn descend<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    let mut parts = key.split('.');
    let mut value = map.get(parts.next()?)?;
    for part in parts {
        value = value.as_object()?.get(part)?;
    }
    (!value.is_null()).then_some(value)
}

/// Describes a value for an error message: short values whole, others by their type.
fn describe(value: &Value) -> String {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    let text = value.to_string();
    if text.chars().count() <= 60 { format!("`{text}`") } else { kind.to_owned() }
}
