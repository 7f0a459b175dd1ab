//! Files that are damaged, missing or of another format.

use std::fs;
use std::path::Path;

use mount_ckpt::PlanOptions;

use crate::common::toy::{Toy, shard_name};
use crate::{BASE, FLASH, KIMI, MIMO, QWEN, refusal};

fn cut(dir: &Path, shard: usize, bytes: u64) {
    let file = fs::File::options().write(true).open(dir.join(shard_name(shard))).unwrap();
    let size = file.metadata().unwrap().len();
    file.set_len(size - bytes).unwrap();
}

/// Replaces the first occurrence of `from` in a shard.
fn patch(dir: &Path, shard: usize, from: &str, to: &str) {
    let path = dir.join(shard_name(shard));
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
    bytes.splice(at..at + from.len(), to.bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn damaged_files_are_named() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000\n";
    type Damage<'a> = (&'static str, &'a dyn Fn(&Path), &'static str);
    let cases: [Damage<'_>; 7] = [
        (
            MIMO,
            &|d| cut(d, 1, 1),
            "`CKPT`: 1 of 3 shards cannot be used: `model-00002-of-00003.safetensors`: truncated: \
             expected 833652 bytes, got 833651; complete the download, for instance with `hf \
             download`",
        ),
        (
            FLASH,
            &|d| fs::remove_file(d.join(shard_name(1))).unwrap(),
            "`CKPT`: 1 of 3 shards cannot be used: `model-00002-of-00003.safetensors`: missing; \
             complete the download, for instance with `hf download`",
        ),
        (
            BASE,
            &|d| fs::write(d.join(shard_name(2)), pointer).unwrap(),
            "`CKPT`: 1 of 3 shards cannot be used: `model-00003-of-00003.safetensors`: a git-LFS \
             pointer of 66 bytes, not the 5000 bytes that it stands for; run `git lfs pull`",
        ),
        (
            KIMI,
            &|d| patch(d, 0, "[64,12]", "[94,12]"),
            "`CKPT`: 1 of 3 shards cannot be used: `model-00001-of-00003.safetensors`: tensor \
             `~.0.gate_proj.weight_packed`: I32 [94, 12] is 4512 bytes, got offsets 3072 apart",
        ),
        (
            KIMI,
            &|d| patch(d, 0, "\"I32\"", "\"I64\""),
            "`CKPT`: 1 of 3 shards cannot be used: `model-00001-of-00003.safetensors`: tensor \
             `~.0.gate_proj.weight_packed`: I64 [64, 12] is 6144 bytes, got offsets 3072 apart",
        ),
        (
            QWEN,
            &|d| patch(d, 2, "[4,96,80]", "[4,80,97]"),
            "`CKPT`: 1 of 3 shards cannot be used: `model-00003-of-00003.safetensors`: tensor \
             `model.language_model.layers.0.mlp.experts.gate_up_proj`: BF16 [4, 80, 97] is 62080 \
             bytes, got offsets 61440 apart",
        ),
        (
            QWEN,
            &|d| {
                for shard in 0..3 {
                    fs::remove_file(d.join(shard_name(shard))).unwrap();
                }
            },
            "`CKPT`: 3 of 3 shards cannot be used: `model-00001-of-00003.safetensors`: missing; \
             `model-00002-of-00003.safetensors`: missing; `model-00003-of-00003.safetensors`: \
             missing; complete the download, for instance with `hf download`",
        ),
    ];
    for (family, damage, expected) in cases {
        let got = refusal(&Toy::golden(family), &PlanOptions::default(), damage);
        assert_eq!(got, expected, "{family}");
    }
}
