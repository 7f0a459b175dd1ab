//! Tests of which shards a checkpoint consists of, and which directories are refused.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::source::testing::{Dir, Tensor, safetensors};
use crate::source::{Checkpoint, INDEX};
use crate::tensor::DType;

fn tensor(name: &str) -> Tensor<'_> {
    (name, DType::U8, &[4], vec![1, 2, 3, 4])
}

fn names(checkpoint: &Checkpoint) -> Vec<&str> {
    checkpoint.tensors().iter().map(|t| &*t.name).collect()
}

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\n\
    oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n\
    size 4998663696\n";

#[test]
fn tensors_are_sorted_over_all_shards() {
    let dir = Dir::new()
        .shard("a.safetensors", &[tensor("m"), tensor("b"), tensor("z")])
        .shard("b.safetensors", &[("k", DType::BF16, &[3, 1], vec![0; 6]), tensor("a")]);
    let checkpoint = dir.open();
    assert_eq!(names(&checkpoint), ["a", "b", "k", "m", "z"]);
    let k = checkpoint.tensor(checkpoint.find("k").expect("stored"));
    let shard = checkpoint.shard(k.shard);
    assert_eq!((k.dtype, k.shape.dims(), k.bytes), (DType::BF16, &[3, 1][..], 6));
    let file = std::fs::read(shard.path()).expect("there");
    let header = u64::from_le_bytes(file[..8].try_into().expect("eight bytes"));
    assert_eq!((shard.name(), k.offset), ("b.safetensors", 8 + header));
    assert_eq!(checkpoint.find("c"), None);
}

#[test]
fn single_file_wins_over_others() {
    let dir = Dir::new()
        .shard("model.safetensors", &[tensor("x")])
        .shard("adapter.safetensors", &[tensor("y")]);
    assert_eq!(names(&dir.open()), ["x"]);
}

#[test]
fn index_wins_over_single_file() {
    let dir = Dir::new()
        .shard("model.safetensors", &[tensor("x")])
        .shard("model-1.safetensors", &[tensor("y")])
        .index(&[("y", "model-1.safetensors")]);
    assert_eq!(names(&dir.open()), ["y"]);
}

#[test]
fn tensors_that_the_index_leaves_out_are_ignored() {
    let dir = Dir::new()
        .shard("a.safetensors", &[tensor("x"), tensor("y")])
        .index(&[("x", "a.safetensors")]);
    assert_eq!(names(&dir.open()), ["x"]);
}

/// A shard was added that replaces some tensors: the index names it, the old copies stay in their
/// shards.
#[test]
fn a_duplicate_tensor_is_read_from_the_shard_that_the_index_names() {
    let dir = Dir::new()
        .shard("a.safetensors", &[tensor("w"), tensor("x"), tensor("y")])
        .shard("b.safetensors", &[("x", DType::U8, &[2], vec![7, 8])])
        .index(&[("w", "a.safetensors"), ("x", "b.safetensors"), ("y", "a.safetensors")]);
    let checkpoint = dir.open();
    assert_eq!(names(&checkpoint), ["w", "x", "y"]);
    let x = checkpoint.tensor(checkpoint.find("x").expect("stored"));
    assert_eq!((checkpoint.shard(x.shard).name(), x.shape.dims()), ("b.safetensors", &[2][..]));
}

#[test]
fn json_escapes_in_names_are_decoded() {
    let dir = Dir::new()
        .shard("a.safetensors", &[("q\"\\\u{e9}", DType::U8, &[1], vec![9])])
        .file(INDEX, r#"{"weight_map": {"q\"\\\u00e9": "a.safetensors"}}"#);
    let checkpoint = dir.open();
    assert_eq!(names(&checkpoint), ["q\"\\\u{e9}"]);
}

#[test]
fn a_directory_without_a_checkpoint_is_refused() {
    let dir = Dir::new();
    let missing = dir.join("none");
    let cases: [(&Path, &str); 3] = [
        (&missing, "does not exist: expected a checkpoint directory"),
        (&dir.join("config.json"), "is not a directory: give the checkpoint directory itself"),
        (dir.path(), "has neither `model.safetensors.index.json` nor any `*.safetensors`"),
    ];
    for (path, expected) in cases {
        let got = Checkpoint::open(path).expect_err("refused").to_string();
        assert_eq!(got, format!("`{}` {expected}", path.display()));
    }
    fs::remove_file(dir.join("config.json")).expect("there");
    assert_eq!(
        dir.refusal(),
        "`DIR` has no `config.json`: give the directory of a Hugging Face checkpoint"
    );
}

#[test]
fn bad_json_is_refused_with_its_position() {
    let cases = [
        (
            "config.json",
            "{\n \"a\": }",
            "`DIR/config.json` is not valid: expected value at line 2 column 7",
        ),
        (
            "config.json",
            "[]",
            "config.json` is not valid: invalid type: sequence, expected a map at line 1 column 0",
        ),
        (
            INDEX,
            "{\"weight_map\": {\"x\": 1}}",
            "invalid type: integer `1`, expected a string at line 1 column 22",
        ),
        (INDEX, "{\"weight_map\": {}} x", "trailing characters at line 1 column 20"),
        (INDEX, "{\"metadata\": {}}", "missing field `weight_map` at line 1 column 16"),
        (
            INDEX,
            "{\"weight_map\": {}, \"weight_map\": {}}",
            "`weight_map` occurs twice at line 1 column 36",
        ),
        (INDEX, "{\"weight_map\": {}}", "`DIR/model.safetensors.index.json` lists no tensor"),
        (
            INDEX,
            "{\"weight_map\": {\"x\": \"a.safetensors\", \"x\": \"b.safetensors\"}}",
            "`DIR/model.safetensors.index.json` lists 1 tensor more than once: `x`",
        ),
        (
            INDEX,
            POINTER,
            "index.json` is a git-LFS pointer, not the file itself: run `git lfs pull`",
        ),
    ];
    for (name, text, expected) in cases {
        let got = Dir::new().file(name, text).refusal();
        assert!(got.ends_with(expected), "{text}: {got}");
    }
}

#[test]
fn file_names_that_leave_the_directory_are_refused() {
    for name in [
        "../a.safetensors",
        "/etc/a.safetensors",
        "sub/a.safetensors",
        "./a.safetensors",
        "a.safetensors/",
        "a\\b.safetensors",
        "a\0.safetensors",
        "..",
        "",
        ".safetensors",
        "config.json",
    ] {
        let got = Dir::new().index(&[("x", name)]).refusal();
        let expected = format!(
            "`DIR/model.safetensors.index.json` lists 1 file outside its directory: \
             expected plain names that end in `.safetensors`, got `{name}`"
        );
        assert_eq!(got, expected);
    }
}

#[test]
fn tensors_that_are_not_where_the_index_says_are_refused() {
    let dir = Dir::new()
        .shard("a.safetensors", &[tensor("x")])
        .shard("b.safetensors", &[tensor("y")])
        .index(&[
            ("a", "a.safetensors"),
            ("x", "a.safetensors"),
            ("y", "a.safetensors"),
            ("z", "b.safetensors"),
        ]);
    assert_eq!(
        dir.refusal(),
        "`DIR/model.safetensors.index.json` lists 3 tensors that their shard does not hold: \
         `a` (listed in `a.safetensors`); \
         `y` (listed in `a.safetensors`, stored in `b.safetensors`); \
         `z` (listed in `b.safetensors`)"
    );
}

#[test]
fn a_tensor_in_two_shards_without_an_index_is_refused() {
    let shards = |dir: Dir| {
        dir.shard("a.safetensors", &[tensor("x")])
            .shard("b.safetensors", &[tensor("x"), tensor("y")])
    };
    let expected = "`DIR`: 1 tensor is in two shards: `x` (`a.safetensors` and `b.safetensors`)";
    assert_eq!(shards(Dir::new()).refusal(), expected);
}

#[test]
fn missing_shards_are_counted() {
    let weights: Vec<(String, String)> =
        (0..9).map(|i| (format!("t{i}"), format!("s{i}.safetensors"))).collect();
    let weights: Vec<(&str, &str)> = weights.iter().map(|(t, s)| (&**t, &**s)).collect();
    let dir = Dir::new().index(&weights).shard("s3.safetensors", &[tensor("t3")]);
    assert_eq!(
        dir.refusal(),
        "`DIR`: 8 of 9 shards cannot be used: \
         `s0.safetensors`: missing; `s1.safetensors`: missing; \
         `s2.safetensors`: missing; `s4.safetensors`: missing; `s5.safetensors`: missing; \
         and 3 more; complete the download, for instance with `hf download`"
    );
}

#[test]
fn an_outdated_index_is_reported() {
    let dir = Dir::new()
        .index(&[("x", "model-00001-of-00004.safetensors")])
        .shard("model-00001-of-00002.safetensors", &[tensor("x")])
        .shard("model-00002-of-00002.safetensors", &[tensor("y")]);
    assert_eq!(
        dir.refusal(),
        "`DIR`: 1 of 1 shards cannot be used: `model-00001-of-00004.safetensors`: missing; the \
         index is out of date: the directory has a complete set of shards with other names \
         (`model-00001-of-00002.safetensors` …), remove the index to use those"
    );
}

#[test]
fn numbered_shards_without_an_index_must_be_complete() {
    let dir = Dir::new().shard("model-00002-of-00003.safetensors", &[tensor("x")]);
    assert_eq!(
        dir.refusal(),
        "`DIR`: 2 of 3 shards cannot be used: `model-00001-of-00003.safetensors`: missing; \
         `model-00003-of-00003.safetensors`: missing; \
         complete the download, for instance with `hf download`"
    );
    let dir = dir
        .shard("model-00001-of-00003.safetensors", &[tensor("y")])
        .shard("model-00003-of-00003.safetensors", &[tensor("z")])
        .shard("other-of-00009.safetensors", &[tensor("w")]);
    assert_eq!(names(&dir.open()), ["w", "x", "y", "z"]);
}

#[test]
fn truncated_and_foreign_shards_are_refused() {
    const FETCH: &str = "; complete the download, for instance with `hf download`";
    let whole = safetensors(&[tensor("x")]);
    let (data_start, full) = (whole.len() - 4, whole.len());
    let long = [&whole[..], b"!!"].concat();
    let cut = |n: String, got: usize| format!("truncated: expected {n} bytes, got {got}{FETCH}");
    let pointer = format!(
        "a git-LFS pointer of {} bytes, not the 4998663696 bytes that it stands for; \
         run `git lfs pull`",
        POINTER.len()
    );
    let trailing = format!("bytes after the last tensor: expected {full} bytes, got {}", full + 2);
    let cases: [(&[u8], String); 7] = [
        (POINTER.as_bytes(), pointer),
        (b"", cut("at least 8".to_owned(), 0)),
        (&whole[..7], cut("at least 8".to_owned(), 7)),
        (&whole[..20], cut(format!("at least {data_start}"), 20)),
        (&whole[..full - 3], cut(full.to_string(), full - 3)),
        (&long, trailing),
        (&[0; 64], "header does not start with `{`".to_owned()),
    ];
    for (bytes, expected) in cases {
        let got = Dir::new().file("model.safetensors", bytes).refusal();
        let expected =
            format!("`DIR`: 1 of 1 shards cannot be used: `model.safetensors`: {expected}");
        assert_eq!(got, expected);
    }
}

#[test]
fn a_directory_or_a_pipe_as_a_shard_is_refused() {
    let expected = "`DIR`: 1 of 1 shards cannot be used: `model.safetensors`: not a regular file";
    assert_eq!(Dir::new().file("model.safetensors/x", "").refusal(), expected);
    let dir = Dir::new();
    nix::unistd::mkfifo(&dir.join("model.safetensors"), nix::sys::stat::Mode::S_IRWXU)
        .expect("a pipe can be made");
    assert_eq!(dir.refusal(), expected);
}

#[test]
fn a_dangling_link_reports_an_unfinished_download() {
    let dir = Dir::new();
    symlink("../../blobs/abc", dir.join("model.safetensors")).expect("a link can be made");
    let got = dir.refusal();
    assert_eq!(
        got,
        "`DIR`: 1 of 1 shards cannot be used: `model.safetensors`: \
         a link to `DIR/../../blobs/abc`, which does not exist; \
         complete the download, for instance with `hf download`"
    );
    let dir = Dir::new().file("blobs/abc.incomplete", "");
    symlink("blobs/abc", dir.join("model.safetensors")).expect("a link can be made");
    assert!(dir.refusal().contains("(an `.incomplete` download of it does)"));

    let dir = Dir::new().file("blobs/abc.incomplete", "");
    symlink("blobs/abc", dir.join(INDEX)).expect("a link can be made");
    assert_eq!(
        dir.refusal(),
        "`DIR/model.safetensors.index.json` points to `DIR/blobs/abc`, which does not exist: \
         its download is incomplete, run `hf download` again"
    );
}

#[test]
fn unfinished_downloads_beside_the_directory_are_counted() {
    let dir = Dir::new()
        .index(&[("x", "a.safetensors")])
        .file(".cache/huggingface/download/a.safetensors.0f.incomplete", "")
        .file(".cache/huggingface/download/b.safetensors.metadata", "");
    assert!(dir.refusal().ends_with(
        "`a.safetensors`: missing; 1 `*.incomplete` download is there, run `hf download` again"
    ));
}

#[test]
fn an_oversized_index_is_not_read() {
    let dir = Dir::new();
    let index = File::create(dir.join(INDEX)).expect("writable");
    index.set_len(1 << 40).expect("a sparse file");
    assert_eq!(
        dir.refusal(),
        "`DIR/model.safetensors.index.json` is too large: \
         expected at most 1073741824 bytes, got 1099511627776"
    );
}
