//! `model.safetensors.index.json`: which shard contains which tensor.

use std::io::Write;

/// The text of an index: `tensors` are names and the file names of their shards.
///
/// It is formatted by hand, line by line as `save_pretrained` does: a JSON document of 200,000
/// tensors would take more memory than the text.
pub(super) fn index(total_size: u64, mut tensors: Vec<(&str, &str)>) -> Vec<u8> {
    const IN_MEMORY: &str = "writing to memory does not fail";
    tensors.sort_unstable();
    let mut out = Vec::new();
    write!(out, "{{\n  \"metadata\": {{\n    \"total_size\": {total_size}\n  }},\n")
        .expect(IN_MEMORY);
    out.extend_from_slice(b"  \"weight_map\": {");
    for (i, (name, file)) in tensors.iter().enumerate() {
        out.extend_from_slice(if i == 0 { b"\n    " } else { b",\n    " });
        serde_json::to_writer(&mut out, name).expect(IN_MEMORY);
        out.extend_from_slice(b": ");
        serde_json::to_writer(&mut out, file).expect(IN_MEMORY);
    }
    out.extend_from_slice(if tensors.is_empty() { b"}\n}\n" } else { b"\n  }\n}\n" });
    out.shrink_to_fit();
    out
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn index_is_json_with_sorted_names() {
        let text = index(12, vec![("b", "x"), ("a\"\\", "y"), ("é", "x"), ("B", "x")]);
        assert_eq!(
            String::from_utf8(text.clone()).expect("UTF-8"),
            "{\n  \"metadata\": {\n    \"total_size\": 12\n  },\n  \"weight_map\": {\n    \
             \"B\": \"x\",\n    \"a\\\"\\\\\": \"y\",\n    \"b\": \"x\",\n    \"é\": \"x\"\n  }\n}\n"
        );
        let value: Value = serde_json::from_slice(&text).expect("valid");
        let map = json!({"B": "x", "a\"\\": "y", "b": "x", "é": "x"});
        assert_eq!(value, json!({"metadata": {"total_size": 12}, "weight_map": map}));
    }

    #[test]
    fn an_empty_index_is_json() {
        let value: Value = serde_json::from_slice(&index(0, Vec::new())).expect("valid");
        assert_eq!(value, json!({"metadata": {"total_size": 0}, "weight_map": {}}));
    }
}
