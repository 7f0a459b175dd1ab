//! Tests of invalid headers, modelled on the tests of the crate `safetensors` and its `attacks/`.

use proptest::prelude::*;
use safetensors::SafeTensors;

use crate::source::checkpoint::ShardId;
use crate::source::header::LENGTH_PREFIX_BYTES;
use crate::source::testing::{Dir, Tensor, raw, safetensors};
use crate::source::{Checkpoint, SourceId, header};
use crate::tensor::DType;

fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

/// A header with the U8 tensor `x` of four bytes, and the text `more` before the closing brace.
fn and(more: &str) -> String {
    format!(r#"{{"x":{}{more}}}"#, entry("U8", "[4]", "[0,4]"))
}

fn only(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"x":{}}}"#, entry(dtype, shape, offsets))
}

/// The message with which a shard of this header and four bytes of data is refused.
fn refusal(header: &[u8]) -> String {
    let got = Dir::new().file("model.safetensors", raw(header, &[0; 4])).refusal();
    let prefix = "`DIR`: 1 of 1 shards cannot be used: `model.safetensors`: ";
    got.strip_prefix(prefix).unwrap_or_else(|| panic!("{got}")).to_owned()
}

#[test]
fn invalid_headers_are_refused() {
    let cases: Vec<(String, &str)> = vec![
        (String::new(), "header does not start with `{`"),
        (format!(" {}", and("")), "header does not start with `{`"),
        (format!("[{}]", and("")), "header does not start with `{`"),
        (format!("{} x", and("")), "trailing characters at line 1 column"),
        (format!("{}\0", and("")), "trailing characters at line 1 column"),
        (and("")[..20].to_owned(), "EOF while parsing a string at line 1 column 20"),
        (and(r#","x":1"#), "invalid type: integer `1`, expected a tensor"),
        (and(r#","y":[]"#), "invalid type: sequence, expected a tensor"),
        (and(&format!(r#","x":{}"#, entry("U8", "[0]", "[4,4]"))), "tensor `x` occurs twice"),
        (and(r#","__metadata__":{"a":1}"#), "invalid type: integer `1`, expected a string"),
        (and(r#","__metadata__":{"a":{}}"#), "invalid type: map, expected a string"),
        (and(r#","__metadata__":"pt""#), "expected `__metadata__` to map strings to strings"),
        (and(r#","__metadata__":{"a":"b","a":"c"}"#), "`__metadata__` has `a` twice"),
        (and(r#","__metadata__":{},"__metadata__":{}"#), "`__metadata__` occurs twice"),
        (r#"{"x":{"shape":[4],"data_offsets":[0,4]}}"#.into(), "tensor `x` has no `dtype`"),
        (r#"{"x":{"dtype":"U8","data_offsets":[0,4]}}"#.into(), "tensor `x` has no `shape`"),
        (r#"{"x":{"dtype":"U8","shape":[4]}}"#.into(), "tensor `x` has no `data_offsets`"),
        (
            r#"{"x":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#.into(),
            "`dtype` occurs twice",
        ),
        (
            only("U8", &format!("[4{}]", ",1".repeat(64)), "[0,4]"),
            "tensor `x`: expected at most 64 axes, got 65",
        ),
        (
            and(&format!(r#","y":{}"#, entry("U8", "[0,4294967296,4294967296]", "[4,4]"))),
            "tensor `y`: U8 [0, 4294967296, 4294967296] is not a whole number of bytes below 2^61",
        ),
        (only("F8_E9M9", "[4]", "[0,4]"), "tensor `x` has the unknown dtype `F8_E9M9`"),
        (only("U8", "[-4]", "[0,4]"), "invalid value: integer `-4`, expected u64"),
        (only("U8", "[4.0]", "[0,4]"), "invalid type: floating point `4.0`, expected u64"),
        (only("U8", "4", "[0,4]"), "invalid type: integer `4`, expected a sequence"),
        (only("U8", "[4]", "[0]"), "invalid length 1, expected a tuple of size 2"),
        (only("U8", "[4]", "[0,4,4]"), "trailing characters"),
        (only("U8", "[4]", "[0,18446744073709551616]"), "expected u64"),
        (only("U8", "[4]", "[4,0]"), "tensor `x` ends before it starts: data_offsets [4, 0]"),
        (only("U8", "[4]", "[1,5]"), "tensor `x` leaves a hole: expected offset 0, got 1"),
        (only("U8", "[3]", "[0,4]"), "tensor `x`: U8 [3] is 3 bytes, got offsets 4 apart"),
        (only("F4", "[7]", "[0,4]"), "tensor `x`: F4 [7] is not a whole number of bytes"),
        (
            only("F64", "[9223372036854775807,3]", "[0,4]"),
            "tensor `x`: F64 [9223372036854775807, 3] is not a whole number of bytes below 2^61",
        ),
        (
            only("U8", "[18446744073709551615]", "[0,18446744073709551615]"),
            "tensor `x`: U8 [18446744073709551615] is not a whole number of bytes below 2^61",
        ),
        (
            only("U8", "[2305843009213693951]", "[0,2305843009213693951]"),
            "truncated: expected 2305843009213694048 bytes, got",
        ),
        (
            and(&format!(r#","y":{}"#, entry("U8", "[2]", "[2,4]"))),
            "tensor `y` overlaps another: expected offset 4, got 2",
        ),
        (
            and(&format!(r#","y":{}"#, entry("U8", "[2]", "[6,8]"))),
            "tensor `y` leaves a hole: expected offset 4, got 6",
        ),
        (only("U8", "[3]", "[0,3]"), "bytes after the last tensor: expected"),
        ("{}".into(), "bytes after the last tensor: expected 10 bytes, got 14"),
    ];
    for (text, expected) in cases {
        let got = refusal(text.as_bytes());
        assert!(got.contains(expected), "{text}\nexpected {expected}\ngot {got}");
    }
    let not_utf8 = and("").replace('x', "?").into_bytes();
    let not_utf8: Vec<u8> =
        not_utf8.into_iter().map(|b| if b == b'?' { 0xff } else { b }).collect();
    assert!(refusal(&not_utf8).starts_with("header is not UTF-8: "));
}

#[test]
fn a_header_beyond_the_limit_is_not_read() {
    for (length, expected) in [
        (100_000_000, "truncated: expected at least 100000008 bytes, got 32"),
        (100_000_001, "header too large: expected at most 100000000 bytes, got 100000001"),
        (u64::MAX, "header too large: expected at most 100000000 bytes, got 18446744073709551615"),
    ] {
        let bytes = [&u64::to_le_bytes(length)[..], &[b'{'; 24]].concat();
        let got = Dir::new().file("model.safetensors", bytes).refusal();
        assert!(got.contains(expected), "{got}");
    }
}

#[test]
fn unusual_but_valid_headers_are_accepted() {
    let cases = [
        (format!("{}\n   ", and("")), 1),
        (and(r#","__metadata__":{}"#), 1),
        (and(&format!(r#","e":{}"#, entry("F32", "[0,7]", "[0,0]"))), 2),
        (and(&format!(r#","e":{}"#, entry("F32", "[7,0]", "[4,4]"))), 2),
        (only("F32", "[]", "[0,4]"), 1),
        (only("F4", "[2,4]", "[0,4]"), 1),
        (r#"{"x":{"extra":[{}],"shape":[4],"data_offsets":[0,4],"dtype":"U8"}}"#.to_owned(), 1),
    ];
    for (text, count) in cases {
        let bytes = raw(&text, &[0; 4]);
        SafeTensors::read_metadata(&bytes).unwrap_or_else(|e| panic!("{text}: {e}"));
        let dir = Dir::new().file("model.safetensors", bytes);
        assert_eq!(dir.open().tensors().len(), count, "{text}");
    }
}

/// The tensors of a file, if [`Checkpoint::open`] would accept it.
fn accepted(bytes: &[u8]) -> Option<Vec<crate::source::SourceTensor>> {
    let (length, rest) = bytes.split_first_chunk()?;
    let text = rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let data_start = LENGTH_PREFIX_BYTES + text.len() as u64;
    let (tensors, data_bytes) = header::parse(text, data_start, ShardId(0)).ok()?;
    (data_start.checked_add(data_bytes) == Some(bytes.len() as u64)).then_some(tensors)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Every header that we accept, the crate `safetensors` accepts too, with the same contents.
    #[test]
    fn accepted_headers_are_accepted_by_the_safetensors_crate(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..40), 0..4),
    ) {
        let tensors: [Tensor<'_>; 3] = [
            ("a.weight", DType::BF16, &[2, 2], vec![1; 8]),
            ("b", DType::U8, &[10], vec![2; 10]),
            ("c", DType::F4, &[4], vec![3; 2]),
        ];
        let mut bytes = safetensors(&tensors);
        let is_whole = edits.is_empty();
        const PIECES: &[u8] = b"0123456789{}[]\",:abcU8F\\ \n.-e\xff";
        for (at, piece) in edits {
            let at = at.index(bytes.len());
            match PIECES.get(piece) {
                Some(&b) => bytes[at] = b,
                None => drop(bytes.remove(at)),
            }
        }
        let theirs = SafeTensors::read_metadata(&bytes);
        let ours = accepted(&bytes);
        prop_assert!(ours.is_some() || !is_whole);
        if let Some(ours) = ours {
            let (n, theirs) = theirs.expect("accepted by us");
            prop_assert_eq!(ours.len(), theirs.tensors().len());
            for t in ours {
                let info = theirs.info(&t.name).expect("the same names");
                let start = t.offset - LENGTH_PREFIX_BYTES - n as u64;
                let (from, to) = info.data_offsets;
                prop_assert_eq!((start, start + t.bytes), (from as u64, to as u64));
                prop_assert_eq!(format!("{}", info.dtype), t.dtype.name());
                let dims: Vec<u64> = info.shape.iter().map(|&d| d as u64).collect();
                prop_assert_eq!(&dims[..], t.shape.dims());
            }
        }
    }
}

#[test]
fn tensors_of_many_shards_are_sorted() {
    let mut dir = Dir::new();
    for i in 0..40 {
        let name = format!("t{:02}", 39 - i);
        let bytes = vec![i; 3];
        dir = dir.shard(&format!("s{i:02}.safetensors"), &[(&name, DType::U8, &[3], bytes)]);
    }
    let checkpoint = Checkpoint::open(dir.path()).expect("whole");
    assert_eq!(checkpoint.tensors().len(), 40);
    for (i, t) in checkpoint.tensors().iter().enumerate() {
        let id = SourceId::new(i).expect("few");
        assert_eq!(*t.name, format!("t{i:02}"));
        assert_eq!(checkpoint.shard(t.shard).name(), format!("s{:02}.safetensors", 39 - i));
        let mut out = [0; 3];
        checkpoint.read(id, 0, &mut out).expect("readable");
        assert_eq!(usize::from(out[2]), 39 - i);
    }
}
