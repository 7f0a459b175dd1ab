//! Tests of which files a view passes through.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::source::INDEX;
use crate::source::testing::Dir;
use crate::tensor::DType;

#[test]
fn host_files_leave_out_what_a_view_replaces() {
    let dir = Dir::new()
        .shard("a.safetensors", &[("x", DType::U8, &[1], vec![1])])
        .index(&[("x", "a.safetensors")])
        .file("unused.safetensors", "")
        .file("hf_quant_config.json", "{}")
        .file("quantize_config.json", "{}")
        .file("tokenizer.json", "12345")
        .file("modeling_x.py", "")
        .file("pytorch_model.bin", "")
        .file(".gitattributes", "")
        .file(".cache/huggingface/x", "")
        .file("original/consolidated.safetensors", "")
        .file("original/params.json", "{}")
        .file("original/config.json", "{}")
        .file("original/model.safetensors.index.json", "{}")
        .file("blobs/b1", "blob");
    symlink("../blobs/b1", dir.join("original/linked.txt")).expect("a link can be made");
    symlink("nowhere", dir.join("dangling.txt")).expect("a link can be made");
    symlink(".", dir.join("circle")).expect("a link can be made");
    let checkpoint = dir.open();
    let names: Vec<&str> =
        checkpoint.host_files().iter().map(|f| f.name.to_str().expect("UTF-8")).collect();
    let expected = [
        "blobs/b1",
        "modeling_x.py",
        "original/config.json",
        "original/linked.txt",
        "original/params.json",
        "pytorch_model.bin",
        "tokenizer.json",
    ];
    assert_eq!(names, expected);
    assert!(!names.contains(&INDEX));

    let file = |name: &str| {
        let found = checkpoint.host_files().iter().find(|f| f.name == Path::new(name));
        found.expect("a host file").clone()
    };
    let tokenizer = file("tokenizer.json");
    let metadata = fs::metadata(dir.join("tokenizer.json")).expect("there");
    assert_eq!((tokenizer.bytes, tokenizer.modified), (5, metadata.modified().expect("known")));
    let linked = file("original/linked.txt");
    assert_eq!((linked.bytes, linked.path), (4, checkpoint.dir().join("blobs/b1")));
}
