//! The config.json of the view: the source's, with the quantization and dtype of the view.
//!
//! Loaders decide by `quantization_config` whether to dequantize. A view that shows BF16 must not
//! state the FP8 of its source, wherever in the file it is stated.

use serde_json::{Map, Value};

use crate::plan::ConfigEntries;
use crate::source::Config;
use crate::tensor::Float;

/// Keys that state how weights are quantized; transformers reads the first.
const QUANTIZATION: [&str; 2] = ["quantization_config", "compression_config"];
/// Keys that state the dtype of the weights: of transformers before version 5, and from 5 on.
const DTYPE: [&str; 2] = ["torch_dtype", "dtype"];
/// The object that contains the language model's settings in a composite model.
const TEXT: &str = "text_config";

/// The text of the view's config.json; `None` if it equals the source's.
///
/// All other keys keep their values and their order.
pub(super) fn rewritten(source: &Map<String, Value>, stated: &ConfigEntries) -> Option<Vec<u8>> {
    let mut config = source.clone();
    set_quantization(&mut config, stated);
    set_dtype(&mut config, stated);
    (config != *source).then(|| Config::write(&config))
}

/// Removes all statements of a quantization and inserts the one of the view, if it has one.
fn set_quantization(config: &mut Map<String, Value>, stated: &ConfigEntries) {
    let new = stated.quantization.as_ref();
    let within = new
        .and_then(|new| new.within.as_ref())
        .filter(|name| config.get(*name).is_some_and(Value::is_object));
    let replace = |object: &mut Map<String, Value>, is_place: bool| {
        match new.filter(|_| is_place) {
            // Replacing a value keeps its position among the keys.
            Some(new) => {
                object.insert(QUANTIZATION[0].to_owned(), new.value.clone());
                object.shift_remove(QUANTIZATION[1]);
            }
            None => QUANTIZATION.iter().for_each(|key| {
                object.shift_remove(*key);
            }),
        }
    };
    replace(config, within.is_none());
    for (name, value) in config.iter_mut() {
        if let Some(object) = value.as_object_mut() {
            replace(object, within == Some(name));
            object.values_mut().for_each(remove_quantization);
        }
    }
}

/// Removes all statements of a quantization, at any depth: nested composite models have one in
/// `thinker_config.text_config`.
fn remove_quantization(value: &mut Value) {
    match value {
        Value::Object(object) => {
            QUANTIZATION.iter().for_each(|key| {
                object.shift_remove(*key);
            });
            object.values_mut().for_each(remove_quantization);
        }
        Value::Array(values) => values.iter_mut().for_each(remove_quantization),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Replaces the dtype if the source states another one than the view has.
fn set_dtype(config: &mut Map<String, Value>, stated: &ConfigEntries) {
    let Some(dtype) = stated.dtype.map(torch_name) else { return };
    let set = |object: &mut Map<String, Value>, every: bool| {
        for key in DTYPE {
            let Some(value) = object.get_mut(key) else { continue };
            let Some(name) = value.as_str() else { continue };
            let name = name.strip_prefix("torch.").unwrap_or(name);
            if name != dtype && (every || name.starts_with("float8")) {
                *value = dtype.into();
            }
        }
    };
    set(config, true);
    for (name, value) in config.iter_mut() {
        // Other towers keep their own dtypes, unless these are quantized ones.
        if let Some(object) = value.as_object_mut() {
            set(object, name == TEXT);
        }
    }
}

fn torch_name(float: Float) -> &'static str {
    match float {
        Float::BF16 => "bfloat16",
        Float::F16 => "float16",
        Float::F32 => "float32",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::mapping::QuantizationConfig;

    /// The rewritten config as compact text, which also shows the order of keys; `None` if
    /// unchanged.
    fn compact(source: &str, stated: &ConfigEntries) -> Option<String> {
        let source: Map<String, Value> = serde_json::from_str(source).expect("valid");
        let text = rewritten(&source, stated)?;
        Some(serde_json::from_slice::<Value>(&text).expect("valid").to_string())
    }

    #[test]
    fn quantization_config_is_removed_or_replaced_in_place() {
        let none = || ConfigEntries::default();
        let new = |within: Option<&str>| {
            let within = within.map(str::to_owned);
            let value = json!({"q": 2});
            let new = QuantizationConfig { within, unquantized: None, scheme: None, value };
            ConfigEntries { quantization: Some(new), dtype: None }
        };
        let cases = [
            (r#"{"b":1,"quantization_config":{"q":1},"a":2}"#, none(), Some(r#"{"b":1,"a":2}"#)),
            (
                r#"{"z":0,"text_config":{"b":1,"quantization_config":{"q":1},"a":2},"y":0.02}"#,
                none(),
                Some(r#"{"z":0,"text_config":{"b":1,"a":2},"y":0.02}"#),
            ),
            (
                r#"{"compression_config":{"q":1},"llm_config":{"quantization_config":null},"y":0}"#,
                none(),
                Some(r#"{"llm_config":{},"y":0}"#),
            ),
            (r#"{"b":1,"text_config":{"a":2}}"#, none(), None),
            (
                r#"{"b":1,"quantization_config":{"q":1},"a":2}"#,
                new(None),
                Some(r#"{"b":1,"quantization_config":{"q":2},"a":2}"#),
            ),
            (
                r#"{"text_config":{"quantization_config":null,"a":2},"y":[]}"#,
                new(Some("text_config")),
                Some(r#"{"text_config":{"quantization_config":{"q":2},"a":2},"y":[]}"#),
            ),
            (
                r#"{"text_config":{"a":2},"quantization_config":{"q":1},"y":0}"#,
                new(Some("text_config")),
                Some(r#"{"text_config":{"a":2,"quantization_config":{"q":2}},"y":0}"#),
            ),
            (
                r#"{"a":2}"#,
                new(Some("text_config")),
                Some(r#"{"a":2,"quantization_config":{"q":2}}"#),
            ),
        ];
        for (source, stated, expected) in cases {
            assert_eq!(compact(source, &stated).as_deref(), expected, "{source}");
        }
    }

    #[test]
    fn dtype_entries_state_the_dtype_of_the_view() {
        let cases = [
            (r#"{"torch_dtype":"bfloat16"}"#, Float::BF16, None),
            (
                r#"{"torch_dtype":"bfloat16","a":1}"#,
                Float::F32,
                Some(r#"{"torch_dtype":"float32","a":1}"#),
            ),
            (
                r#"{"dtype":"float8_e4m3fn","text_config":{"dtype":"bfloat16"}}"#,
                Float::F16,
                Some(r#"{"dtype":"float16","text_config":{"dtype":"float16"}}"#),
            ),
            (
                r#"{"vision_config":{"torch_dtype":"float32"},"audio_config":{"dtype":"float8_e4m3fn"}}"#,
                Float::BF16,
                Some(
                    r#"{"vision_config":{"torch_dtype":"float32"},"audio_config":{"dtype":"bfloat16"}}"#,
                ),
            ),
            (r#"{"a":1}"#, Float::F32, None),
        ];
        for (source, dtype, expected) in cases {
            let stated = ConfigEntries { quantization: None, dtype: Some(dtype) };
            assert_eq!(compact(source, &stated).as_deref(), expected, "{source}");
        }
    }

    #[test]
    fn text_is_indented_by_two_and_ends_in_a_newline() {
        let text = r#"{"a": [1], "quantization_config": 0, "é": "ü"}"#;
        let source: Map<String, Value> = serde_json::from_str(text).expect("valid");
        let got = rewritten(&source, &ConfigEntries::default()).expect("changed");
        assert_eq!(
            String::from_utf8(got).expect("UTF-8"),
            "{\n  \"a\": [\n    1\n  ],\n  \"é\": \"ü\"\n}\n"
        );
    }

    #[test]
    fn numbers_keep_their_value() {
        // An inexact float parser would read 2.5066282746310002 as a neighbouring double.
        let text = r#"{"a":1e-06,"b":2.5066282746310002,"c":18446744073709551615,"quantization_config":0}"#;
        let source: Map<String, Value> = serde_json::from_str(text).expect("valid");
        let got = rewritten(&source, &ConfigEntries::default()).expect("changed");
        let got: Value = serde_json::from_slice(&got).expect("valid");
        assert_eq!(got["a"].as_f64(), Some(1e-6));
        assert_eq!(got["b"].as_f64(), Some(2.5066282746310002));
        assert_eq!(got["c"].as_u64(), Some(u64::MAX));
    }
}
