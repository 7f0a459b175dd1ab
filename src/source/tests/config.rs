//! Tests of look-ups in config.json.

use serde_json::json;

use crate::source::Config;

fn config(value: serde_json::Value) -> Config {
    Config::parse(value.to_string().into_bytes()).expect("an object")
}

#[test]
fn top_level_wins_over_text_config() {
    let config = config(json!({
        "model_type": "kimi_k25",
        "hidden_size": 1,
        "num_experts": null,
        "vision_config": { "depth": 27, "model_type": "moonvit" },
        "text_config": {
            "model_type": "kimi_k2", "hidden_size": 2, "num_experts": 384,
            "rope_scaling": { "factor": 64 },
        },
    }));
    for (key, expected) in [
        ("hidden_size", Some(1)),
        ("text_config.hidden_size", Some(2)),
        ("num_experts", Some(384)),
        ("rope_scaling.factor", Some(64)),
        ("vision_config.depth", Some(27)),
        ("depth", None),
        ("hidden_size.x", None),
    ] {
        assert_eq!(config.int(key).ok(), expected, "{key}");
    }
    assert_eq!(config.model_type(), Some("kimi_k25"));
    assert_eq!(config.model_types(), ["kimi_k25", "moonvit", "kimi_k2"]);
}

#[test]
fn errors_name_the_key_and_the_value() {
    let config = config(json!({
        "a": -1, "b": "7", "c": 1.5, "d": [1, "x"],
        "e": "a text that is much too long to be repeated word for word here",
    }));
    for (key, expected) in [
        ("a", "an integer from 0 on, got `-1`"),
        ("b", "an integer from 0 on, got `\"7\"`"),
        ("c", "an integer from 0 on, got `1.5`"),
        ("d", "an integer from 0 on, got `[1,\"x\"]`"),
        ("e", "an integer from 0 on, got a string"),
        ("f.g", "an integer from 0 on, got nothing"),
    ] {
        let got = config.int(key).expect_err("no integer").to_string();
        assert_eq!(got, format!("config.json: `{key}`: expected {expected}"));
    }
    let got = config.string("a").expect_err("no string").to_string();
    assert_eq!(got, "config.json: `a`: expected a string, got `-1`");
    let got = config.ints("d").expect_err("no integers").to_string();
    assert_eq!(got, "config.json: `d`: expected a list of integers from 0 on, got `[1,\"x\"]`");
}

#[test]
fn quantization_config_is_found_at_the_top_or_in_text_config() {
    let fp8 = json!({ "quant_method": "fp8", "weight_block_size": [128, 64] });
    for (value, expected) in [
        (json!({}), Ok(None)),
        (json!({ "quantization_config": null }), Ok(None)),
        (json!({ "quantization_config": { "quant_method": "x" } }), Ok(None)),
        (json!({ "quantization_config": fp8 }), Ok(Some([128, 64]))),
        (json!({ "text_config": { "quantization_config": fp8 } }), Ok(Some([128, 64]))),
        (json!({ "quantization_config": { "weight_block_size": [128] } }), Err("`[128]`")),
        (json!({ "quantization_config": { "weight_block_size": [0, 1] } }), Err("`[0,1]`")),
    ] {
        let config = config(value.clone());
        let got = config.weight_block_size().map_err(|e| e.found);
        assert_eq!(got, expected.map_err(str::to_owned), "{value}");
    }
    let nested = config(json!({ "text_config": { "quantization_config": fp8 } }));
    let quantization = nested.quantization_config().expect("nested");
    assert_eq!(quantization["quant_method"], "fp8");
}

#[test]
fn group_size_is_found_if_all_groups_agree() {
    let groups = |groups: serde_json::Value| {
        let config = config(json!({ "quantization_config": { "config_groups": groups } }));
        config.group_size().map_err(|e| e.to_string())
    };
    let sized = |size: serde_json::Value| json!({ "weights": { "group_size": size } });
    let [a, b] = [sized(json!(32)), sized(json!(128))];
    assert_eq!(config(json!({})).group_size(), Ok(None));
    assert_eq!(groups(json!({})), Ok(None));
    assert_eq!(groups(json!({ "group_0": a })), Ok(Some(32)));
    assert_eq!(groups(json!({ "group_0": a, "group_1": a })), Ok(Some(32)));
    assert_eq!(groups(json!({ "group_0": a, "group_1": b })), Ok(None));
    assert_eq!(groups(json!({ "group_0": sized(json!(-1)), "group_1": b })), Ok(Some(128)));
    let expected = "config.json: `quantization_config.config_groups.group_0.weights.group_size`: \
                    expected an integer above 0, got `0`";
    assert_eq!(groups(json!({ "group_0": sized(json!(0)) })), Err(expected.to_owned()));
}

#[test]
fn key_order_and_bytes_are_kept() {
    let text = b"{ \"z\": 1,\n \"a\": 2 }\n";
    let config = Config::parse(text.to_vec()).expect("an object");
    assert_eq!(config.raw(), text);
    assert_eq!(config.top().keys().collect::<Vec<_>>(), ["z", "a"]);
}

/// Python's `json` writes and reads `NaN` and `Infinity`, which are no JSON. A config.json that a
/// view rewrites must keep them.
#[test]
fn nan_and_infinity_of_python_are_read_and_written() {
    let text = br#"{"a": Infinity, "b": [-Infinity, NaN], "c": "NaN, \"Infinity", "q": 1}"#;
    let config = Config::parse(text.to_vec()).expect("an object");
    let mut top = config.top().clone();
    top.shift_remove("q");
    let written = String::from_utf8(Config::write(&top)).expect("UTF-8");
    assert_eq!(
        written,
        "{\n  \"a\": Infinity,\n  \"b\": [\n    -Infinity,\n    NaN\n  ],\n  \"c\": \"NaN, \\\"Infinity\"\n}\n"
    );
    assert!(Config::parse(b"{\"a\": Infinit}".to_vec()).is_err());
}
