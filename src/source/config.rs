//! config.json: the parsed text with typed look-ups.
//!
//! Vision-language checkpoints keep the language model's settings in `text_config`. A key is
//! looked up at the top level first and then there, and nowhere else: a `vision_config` has keys of
//! the same names with other meanings.
//!
//! Python writes `Infinity`, `-Infinity` and `NaN`, which are no JSON. They are read as strings
//! that no file has otherwise, and [`Config::write`] writes them as they were.

use std::borrow::Cow;

use serde_json::{Map, Value};

/// A key of config.json that is absent or not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("config.json: `{key}`: expected {expected}, got {found}")]
pub struct ConfigError {
    /// The key, dotted.
    pub key: String,
    /// What it should be.
    pub expected: &'static str,
    /// What is there.
    pub found: String,
}

/// A parsed config.json, keys in their order.
#[derive(Debug, Clone)]
pub struct Config {
    raw: Vec<u8>,
    top: Map<String, Value>,
}

impl Config {
    /// Parses the text of a config.json.
    ///
    /// # Errors
    /// Where it is not a JSON object.
    pub(crate) fn parse(raw: Vec<u8>) -> Result<Config, serde_json::Error> {
        let top = serde_json::from_slice(&with_quoted_constants(&raw))?;
        Ok(Config { raw, top })
    }

    /// The text of a config.json that holds these keys: indented by two, with a newline at its end.
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

    /// The value at a dotted key such as `num_hidden_layers` or `text_config.num_hidden_layers`:
    /// at the top level, else in `text_config`. A null is as good as an absent key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let in_text = || descend(self.top.get("text_config")?.as_object()?, key);
        descend(&self.top, key).or_else(in_text)
    }

    /// The integer at `key`.
    ///
    /// # Errors
    /// Where there is no value, or one that is not an integer from 0 on.
    pub fn int(&self, key: &str) -> Result<u64, ConfigError> {
        self.typed(key, "an integer from 0 on", Value::as_u64)
    }

    /// The string at `key`.
    ///
    /// # Errors
    /// Where there is no value, or one that is not a string.
    pub fn string(&self, key: &str) -> Result<&str, ConfigError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// The list of integers at `key`.
    ///
    /// # Errors
    /// Where there is no value, or one that is not a list of integers from 0 on.
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

    /// Every `model_type`: the top-level one, then those of the objects within, in their order.
    pub fn model_types(&self) -> Vec<&str> {
        let nested = self.top.values().filter_map(|v| v.as_object()?.get("model_type")?.as_str());
        self.model_type().into_iter().chain(nested).collect()
    }

    /// `quantization_config`, at the top level or in `text_config`.
    pub fn quantization_config(&self) -> Option<&Map<String, Value>> {
        self.get("quantization_config")?.as_object()
    }

    /// Rows and columns of an FP8 block by `quantization_config.weight_block_size`; `None` where
    /// the config gives none.
    ///
    /// # Errors
    /// Where it is not a pair of integers above 0.
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

    /// Columns that an INT4 scale serves by `quantization_config.config_groups`
    /// (compressed-tensors); `None` where the config gives none, or groups of different sizes.
    ///
    /// # Errors
    /// Where one is not an integer above 0.
    pub(crate) fn group_size(&self) -> Result<Option<u64>, ConfigError> {
        const GROUPS: &str = "quantization_config.config_groups";
        let groups = self.get(GROUPS).and_then(Value::as_object);
        let mut sizes = Vec::new();
        for name in groups.into_iter().flat_map(Map::keys) {
            let key = format!("{GROUPS}.{name}.weights.group_size");
            // -1 and null stand for one scale a row.
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

/// What Python's `json` reads and writes beside JSON; the longest first.
const CONSTANTS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// The string that stands for a constant. It starts with U+0000, which no text in a config.json has.
fn quoted(constant: &str) -> String {
    format!("\u{0}{constant}")
}

/// The text with Python's constants as strings, those within strings left alone.
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
                // Whatever is escaped ends no string.
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

fn descend<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    let mut parts = key.split('.');
    let mut value = map.get(parts.next()?)?;
    for part in parts {
        value = value.as_object()?.get(part)?;
    }
    (!value.is_null()).then_some(value)
}

/// A value as a message shows it: short ones whole, others by their kind.
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
