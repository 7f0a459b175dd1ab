//! The config.json of the view: the source's, with `quantization_config` as the plan wants it.

use serde_json::{Map, Value};

use crate::plan::Quantization;

const KEY: &str = "quantization_config";
/// Composite models keep their language model's settings here.
const TEXT: &str = "text_config";

/// The view's config.json, or `None` where the source's own bytes serve.
///
/// Every key but `quantization_config` keeps its value and its place.
pub(super) fn rewritten(
    source: &Map<String, Value>,
    quantization: &Quantization,
) -> Option<Vec<u8>> {
    let mut config = source.clone();
    match quantization {
        Quantization::Keep => return None,
        Quantization::Remove => {
            let at_top = config.shift_remove(KEY).is_some();
            let nested = text(&mut config).is_some_and(|text| text.shift_remove(KEY).is_some());
            if !at_top && !nested {
                return None;
            }
        }
        Quantization::Replace(new) => {
            let place = match &new.within {
                Some(name) => config.get_mut(name).and_then(Value::as_object_mut),
                None => Some(&mut config),
            };
            match place {
                Some(object) => object.insert(KEY.to_owned(), new.value.clone()),
                None => config.insert(KEY.to_owned(), new.value.clone()),
            };
        }
    }
    let mut bytes = serde_json::to_vec_pretty(&config).expect("a JSON value can be written");
    bytes.push(b'\n');
    Some(bytes)
}

fn text(config: &mut Map<String, Value>) -> Option<&mut Map<String, Value>> {
    config.get_mut(TEXT)?.as_object_mut()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::mapping::QuantizationConfig;

    #[test]
    fn quantization_config_is_kept_removed_or_replaced_in_place() {
        let new = |within: Option<&str>| {
            let within = within.map(str::to_owned);
            let value = json!({"q": 2});
            Quantization::Replace(QuantizationConfig { within, unquantized: None, value })
        };
        let cases = [
            (r#"{"b":1,"quantization_config":{"q":1},"a":2}"#, Quantization::Keep, None),
            (
                r#"{"b":1,"quantization_config":{"q":1},"a":2}"#,
                Quantization::Remove,
                Some(r#"{"b":1,"a":2}"#),
            ),
            (
                r#"{"z":0,"text_config":{"b":1,"quantization_config":{"q":1},"a":2},"y":0.02}"#,
                Quantization::Remove,
                Some(r#"{"z":0,"text_config":{"b":1,"a":2},"y":0.02}"#),
            ),
            (r#"{"b":1,"text_config":{"a":2}}"#, Quantization::Remove, None),
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
                r#"{"text_config":{"a":2},"y":0}"#,
                new(Some("text_config")),
                Some(r#"{"text_config":{"a":2,"quantization_config":{"q":2}},"y":0}"#),
            ),
            (
                r#"{"a":2}"#,
                new(Some("text_config")),
                Some(r#"{"a":2,"quantization_config":{"q":2}}"#),
            ),
        ];
        for (source, quantization, expected) in cases {
            let source: Map<String, Value> = serde_json::from_str(source).expect("valid");
            let got = rewritten(&source, &quantization);
            // Key order counts, so compare text.
            let compact = got
                .map(|bytes| serde_json::from_slice::<Value>(&bytes).expect("valid").to_string());
            assert_eq!(compact.as_deref(), expected, "{source:?}");
        }
    }

    #[test]
    fn text_is_indented_by_two_and_ends_in_a_newline() {
        let text = r#"{"a": [1], "quantization_config": 0, "é": "ü"}"#;
        let source: Map<String, Value> = serde_json::from_str(text).expect("valid");
        let got = rewritten(&source, &Quantization::Remove).expect("changed");
        assert_eq!(
            String::from_utf8(got).expect("UTF-8"),
            "{\n  \"a\": [\n    1\n  ],\n  \"é\": \"ü\"\n}\n"
        );
    }

    #[test]
    fn numbers_keep_their_value() {
        // Not the nearest double under a parser that is fast and not exact.
        let text = r#"{"a":1e-06,"b":2.5066282746310002,"c":18446744073709551615,"quantization_config":0}"#;
        let source: Map<String, Value> = serde_json::from_str(text).expect("valid");
        let got = rewritten(&source, &Quantization::Remove).expect("changed");
        let got: Value = serde_json::from_slice(&got).expect("valid");
        assert_eq!(got["a"].as_f64(), Some(1e-6));
        assert_eq!(got["b"].as_f64(), Some(2.5066282746310002));
        assert_eq!(got["c"].as_u64(), Some(u64::MAX));
    }
}
