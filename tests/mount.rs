//! Views through a real mount, read as any program would: `std::fs`, `pread` at odd places, mmap.

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Tensor, Zeros, assert_same, golden, tensors_of};

const BINARY: &str = env!("CARGO_BIN_EXE_mount-ckpt");

/// A mount that is taken down when it goes, also when a test fails.
struct Mount {
    dir: tempfile::TempDir,
}

impl Mount {
    /// Mounts `source`; `None` where there is no /dev/fuse, which CI does not accept.
    fn new(source: &Path, options: &[&str]) -> Option<Mount> {
        if !Path::new("/dev/fuse").exists() {
            assert!(std::env::var_os("CI").is_none(), "CI needs /dev/fuse for the mount tests");
            eprintln!("NOT TESTED: /dev/fuse is missing, no view was mounted");
            return None;
        }
        let mount = Mount { dir: tempfile::tempdir().unwrap() };
        let output =
            Command::new(BINARY).args(options).arg(source).arg(mount.at()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(mount)
    }

    fn at(&self) -> &Path {
        self.dir.path()
    }

    fn shards(&self, dir: &str) -> Vec<PathBuf> {
        let all = std::fs::read_dir(self.at().join(dir)).unwrap();
        let mut shards: Vec<PathBuf> = all
            .map(|e| e.unwrap().path())
            .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        shards.sort();
        shards
    }

    fn tensors(&self, dir: &str) -> BTreeMap<String, Tensor> {
        self.shards(dir).iter().flat_map(|p| tensors_of(p)).collect()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let done = Command::new(BINARY).arg("umount").arg(self.at()).output().unwrap();
        if !done.status.success() {
            let _ = Command::new(BINARY).args(["umount", "--lazy"]).arg(self.at()).output();
            eprintln!("in use: {}", String::from_utf8_lossy(&done.stderr));
        }
    }
}

#[test]
fn every_family_is_golden_through_a_mount() {
    let cases = [
        ("mimo-v2-flash", Zeros::Signed),
        ("deepseek-v4-flash", Zeros::Equal),
        ("deepseek-v4-base", Zeros::Signed),
        ("kimi-k25-vl", Zeros::Signed),
        ("qwen3-vl-moe", Zeros::Signed),
    ];
    for (folder, zeros) in cases {
        let source = golden(folder).join("checkpoint");
        let Some(mount) = Mount::new(&source, &["--shard-size", "200KB"]) else { return };
        let expected = tensors_of(&golden(folder).join("native.safetensors"));
        assert_same(&mount.tensors(""), &expected, zeros);
        assert!(mount.shards("").len() > 1, "{folder}: one shard tests no boundary");

        let index = std::fs::read(mount.at().join("model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        let total: usize = expected.values().map(|(_, _, bytes)| bytes.len()).sum();
        assert_eq!(index["metadata"]["total_size"], total, "{folder}");
        let listed = index["weight_map"].as_object().unwrap();
        assert!(listed.keys().eq(expected.keys()), "{folder}");

        let config = std::fs::read(mount.at().join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let within = [&config, &config["text_config"]];
        assert!(within.iter().all(|c| c.get("quantization_config").is_none()), "{folder}");
        let tokenizer = "tokenizer_config.json";
        assert_eq!(
            std::fs::read(mount.at().join(tokenizer)).unwrap(),
            std::fs::read(source.join(tokenizer)).unwrap()
        );
    }
}

#[test]
fn any_way_of_reading_gives_the_same_bytes() {
    let source = golden("mimo-v2-flash").join("checkpoint");
    for options in [&["--cache-size", "64MiB"][..], &["--cache-size", "0"], &["--direct-io"]] {
        let Some(mount) = Mount::new(&source, options) else { return };
        let shard = &mount.shards("")[0];
        let whole = std::fs::read(shard).unwrap();
        let file = std::fs::File::open(shard).unwrap();
        for (at, len) in [(0, 1), (7, 4096), (4095, 2), (100_001, 300_003), (whole.len() - 5, 5)] {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, u64::try_from(at).unwrap()).unwrap();
            assert!(bytes == whole[at..at + len], "{len} bytes at {at} with {options:?}");
        }
        assert_eq!(file.read_at(&mut [0; 8], u64::try_from(whole.len()).unwrap()).unwrap(), 0);
        // SAFETY: the mount is read-only and its files never change.
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file).unwrap() };
        assert!(map[..] == whole[..], "mmap with {options:?}");
    }
}

#[test]
fn many_readers_read_the_same_bytes() {
    let source = golden("deepseek-v4-flash").join("checkpoint");
    let Some(mount) = Mount::new(&source, &["--cache-size", "1MiB", "--direct-io"]) else { return };
    let shard = &mount.shards("")[0];
    let whole = std::fs::read(shard).unwrap();
    std::thread::scope(|scope| {
        for reader in 0..8 {
            let whole = &whole;
            scope.spawn(move || {
                let file = std::fs::File::open(shard).unwrap();
                let step = 10_007 + reader * 777;
                for at in (0..whole.len()).step_by(step) {
                    let mut bytes = vec![0; step.min(whole.len() - at)];
                    file.read_exact_at(&mut bytes, u64::try_from(at).unwrap()).unwrap();
                    assert!(bytes == whole[at..at + bytes.len()], "reader {reader} at {at}");
                }
            });
        }
    });
}

#[test]
fn expert_parallel_directories_are_checkpoints_of_their_own() {
    let source = golden("mimo-v2-flash").join("checkpoint");
    let Some(mount) = Mount::new(&source, &["--ep-size", "2"]) else { return };
    let whole = mount.tensors("");
    for (rank, experts) in [(0, 0..2), (1, 2..3)] {
        let dir = format!("ep-{rank:04}-of-0002");
        for file in ["config.json", "tokenizer_config.json", "model.safetensors.index.json"] {
            assert!(mount.at().join(&dir).join(file).exists(), "{dir}/{file}");
        }
        let expected = whole
            .iter()
            .map(|(name, (dtype, shape, bytes))| {
                if !name.contains(".experts.") {
                    return (name.clone(), (dtype.clone(), shape.clone(), bytes.clone()));
                }
                let each = bytes.len() / shape[0];
                let mut cut = shape.clone();
                cut[0] = experts.len();
                let bytes = bytes[experts.start * each..experts.end * each].to_vec();
                (name.clone(), (dtype.clone(), cut, bytes))
            })
            .collect();
        assert_same(&mount.tensors(&dir), &expected, Zeros::Signed);

        let alone = Mount::new(&source, &["--ep-size", "2", "--ep-rank", &rank.to_string()]);
        assert_same(&alone.unwrap().tensors(""), &expected, Zeros::Signed);
    }
}

#[test]
fn an_expert_shard_cuts_axis_1() {
    let source = golden("qwen3-vl-moe").join("checkpoint");
    let options = ["--ep-shard-size", "4", "--ep-shard-rank", "1"];
    let Some(mount) = Mount::new(&source, &options) else { return };
    let whole = tensors_of(&golden("qwen3-vl-moe").join("native.safetensors"));
    for (name, (_, shape, bytes)) in mount.tensors("") {
        let (_, whole_shape, whole_bytes) = &whole[&name];
        if !name.contains(".experts.") {
            assert_eq!((&shape, &bytes), (whole_shape, whole_bytes), "{name}");
            continue;
        }
        let [experts, rows, cols] = whole_shape[..] else { panic!("{name} is grouped") };
        assert_eq!(shape, [experts, rows / 4, cols], "{name}");
        let row = cols * 2;
        let expected: Vec<u8> = (0..experts)
            .flat_map(|e| {
                let start = (e * rows + rows / 4) * row;
                whole_bytes[start..start + rows / 4 * row].to_vec()
            })
            .collect();
        assert!(bytes == expected, "{name}");
    }
}

#[test]
fn a_mount_of_a_mount_is_the_checkpoint_again() {
    for (folder, options) in [("qwen3-vl-moe", &[][..]), ("deepseek-v4-base", &["--dtype", "f32"])]
    {
        let source = golden(folder).join("checkpoint");
        let Some(native) = Mount::new(&source, options) else { return };
        let original = source.to_str().unwrap();
        let back = ["--to", "hf", "--quantize", "checkpoint", "--scales-from", original];
        let back = Mount::new(native.at(), &back).unwrap();
        let source_files = std::fs::read_dir(&source).unwrap().map(|e| e.unwrap().path());
        let expected: BTreeMap<String, Tensor> = source_files
            .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .flat_map(|p| tensors_of(&p))
            .collect();
        let got = back.tensors("");
        assert_eq!(got.len(), expected.len(), "{folder}");
        for (name, tensor) in &expected {
            assert!(got[name] == *tensor, "{folder}: `{name}`");
        }
        let config = |dir: &Path| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
        };
        assert_eq!(config(back.at()), config(&source), "{folder}");
    }
}

#[test]
fn a_shard_that_is_cut_under_the_mount_is_an_error_and_no_end() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden("mimo-v2-flash").join("checkpoint")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let Some(mount) = Mount::new(dir.path(), &[]) else { return };
    let shard = dir.path().join("model-00003-of-00003.safetensors");
    std::fs::OpenOptions::new().write(true).open(&shard).unwrap().set_len(5000).unwrap();
    let error = std::fs::read(&mount.shards("")[0]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    // What the cut shard does not serve is still there.
    let whole = tensors_of(&golden("mimo-v2-flash").join("native.safetensors"));
    let name = "model.norm.weight";
    let one = mount.at().join(".mount-ckpt/tensors").join(format!("{name}.safetensors"));
    assert!(tensors_of(&one)[name] == whole[name]);
}
