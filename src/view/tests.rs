//! Tests of a whole view: names, attributes, bytes and errors.

use crate::tensor::to_u64;
use std::fs;

use serde_json::Value;

use super::testing::{TENSORS, bytes_of, source, view};
use super::*;

fn find(view: &View, path: &str) -> Ino {
    path.split('/').filter(|p| !p.is_empty()).fold(Ino::ROOT, |ino, name| {
        view.lookup(ino, name.as_ref()).unwrap_or_else(|e| panic!("{path}: {e}")).ino
    })
}

fn whole(view: &View, path: &str) -> Vec<u8> {
    let ino = find(view, path);
    let size = usize::try_from(view.attr(ino).expect("there").size).expect("small");
    let mut out = vec![0; size + 10];
    let n = view.read(ino, 0, &mut out).expect("readable");
    assert_eq!(n, size, "{path}");
    out.truncate(n);
    out
}

fn names(view: &View, path: &str) -> Vec<String> {
    let ino = find(view, path);
    let entries = (0..).map_while(|n| view.entry(ino, n).expect("a directory"));
    entries.map(|e| e.name.into_owned()).collect()
}

#[test]
fn every_directory_holds_a_checkpoint() {
    let dir = source();
    let view = view(&dir);
    let expected = [
        ".",
        "..",
        ".mount-ckpt",
        "config.json",
        "ep-0000-of-0001",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "sub",
        "tokenizer.json",
    ];
    assert_eq!(names(&view, ""), expected);
    for (path, count) in [("", 7), ("ep-0000-of-0001", 3)] {
        let config = String::from_utf8(whole(&view, &format!("{path}/config.json")));
        assert_eq!(config.expect("UTF-8"), "{\n  \"model_type\": \"toy\",\n  \"z\": 0.1\n}\n");
        assert_eq!(whole(&view, &format!("{path}/sub/code.py")), b"pass\n");
        let index = whole(&view, &format!("{path}/model.safetensors.index.json"));
        let index: Value = serde_json::from_slice(&index).expect("JSON");
        let map = index["weight_map"].as_object().expect("a map");
        let mut total = 0;
        for (name, file) in map {
            let file = whole(&view, &format!("{path}/{}", file.as_str().expect("a name")));
            let shard = safetensors::SafeTensors::deserialize(&file).expect("valid");
            let got = shard.tensor(name).expect("listed");
            assert!(got.data() == bytes_of(name), "{name}");
            let (_, dtype, dims) = TENSORS.iter().find(|(n, ..)| n == name).expect("known");
            assert_eq!(got.dtype().to_string(), dtype.name(), "{name}");
            assert!(got.shape().iter().map(|&d| to_u64(d)).eq(dims.iter().copied()), "{name}");
            total += to_u64(got.data().len());
        }
        assert_eq!(map.len(), count, "{path}");
        assert_eq!(index["metadata"]["total_size"], total, "{path}");
    }
}

#[test]
fn every_tensor_has_a_file_of_its_own() {
    let dir = source();
    let view = view(&dir);
    for (name, ..) in TENSORS {
        let path = format!(".mount-ckpt/tensors/{}.safetensors", name.replace('/', "%2F"));
        let file = whole(&view, &path);
        let alone = safetensors::SafeTensors::deserialize(&file).expect("valid");
        assert_eq!(alone.len(), 1, "{name}");
        assert!(alone.tensor(name).expect("there").data() == bytes_of(name), "{name}");
    }
    assert_eq!(names(&view, ".mount-ckpt/tensors").len(), 2 + 7);
    assert_eq!(names(&view, ".mount-ckpt/ep-0000-of-0001/tensors").len(), 2 + 3);
}

#[test]
fn attributes_follow_the_options_and_the_source() {
    let dir = source();
    let view = view(&dir);
    let time_of =
        |name: &str| fs::metadata(dir.join(name)).and_then(|m| m.modified()).expect("a time");
    let root = view.attr(Ino::ROOT).expect("there");
    assert_eq!((root.kind, root.mode, root.links), (Kind::Directory, 0o555, 5));
    assert_eq!(root.mtime, time_of("model.safetensors"));
    for (path, size, time) in [
        // The size depends on the header, so it is not stated here; `whole` compares it with the
        // bytes.
        ("model-00001-of-00002.safetensors", None, "model.safetensors"),
        (".mount-ckpt/tensors/norm.safetensors", Some(4096 + 28), "model.safetensors"),
        ("config.json", Some(38), "config.json"),
        ("sub/code.py", Some(5), "sub/code.py"),
        (".mount-ckpt/stats.json", Some(0), "model.safetensors"),
    ] {
        let attr = view.attr(find(&view, path)).expect("there");
        assert_eq!((attr.kind, attr.mode, attr.links), (Kind::File, 0o444, 1), "{path}");
        assert_eq!(attr.mtime, time_of(time), "{path}");
        if let Some(size) = size {
            assert_eq!(attr.size, size, "{path}");
        }
        assert_eq!(view.path(attr.ino), path);
    }
}

#[test]
fn content_says_how_to_open_a_file() {
    let dir = source();
    let view = view(&dir);
    let content = |path: &str| view.content(find(&view, path));
    assert!(matches!(content("model-00001-of-00002.safetensors"), Ok(Content::Computed)));
    assert!(matches!(content(".mount-ckpt/tensors/norm.safetensors"), Ok(Content::Computed)));
    assert!(matches!(content("config.json"), Ok(Content::Memory)));
    assert!(matches!(content("tokenizer.json"), Ok(Content::Passthrough(_))));
    assert!(matches!(content(".mount-ckpt/stats.json"), Ok(Content::Status)));
    assert!(matches!(content(""), Err(ViewError::IsADirectory)));
}

#[test]
fn each_invalid_look_up_has_its_error() {
    let dir = source();
    let view = view(&dir);
    let file = find(&view, "config.json");
    assert!(matches!(view.read(Ino::ROOT, 0, &mut [0]), Err(ViewError::IsADirectory)));
    assert!(matches!(view.lookup(file, "x".as_ref()), Err(ViewError::NotADirectory)));
    assert!(matches!(view.lookup(Ino::ROOT, "x".as_ref()), Err(ViewError::NotFound)));
    assert!(matches!(view.attr(Ino(999)), Err(ViewError::NotFound)));
    assert!(matches!(view.snapshot(file), Err(ViewError::NotFound)));
    let parent = view.lookup(find(&view, "sub"), "..".as_ref()).expect("has a parent");
    assert_eq!(parent.ino, Ino::ROOT);
}

#[test]
fn a_truncated_shard_fails_the_reads_that_need_it() {
    let dir = source();
    let view = view(&dir);
    let shard = fs::File::options().write(true).open(dir.join("model.safetensors")).expect("there");
    let size = shard.metadata().expect("there").len();
    shard.set_len(size - 1).expect("cut");
    let ino = find(&view, ".mount-ckpt/tensors/z.last.safetensors");
    assert_eq!(view.read(ino, 0, &mut [0; 5000]).expect("lies before the cut"), 5000);
    let error = view.read(ino, 100_000, &mut [0; 5000]).expect_err("cut").to_string();
    assert_eq!(error, "cannot read `.mount-ckpt/tensors/z.last.safetensors` at byte 100000");
    let stats = view.snapshot(find(&view, ".mount-ckpt/stats.json")).expect("live");
    let stats: Value = serde_json::from_slice(&stats).expect("JSON");
    assert_eq!((&stats["served"]["reads"], &stats["served"]["errors"]), (&json!(2), &json!(1)));
    assert_eq!((&stats["engine"]["errors"], &stats["served"]["bytes"]), (&json!(1), &json!(5000)));
}
