//! Reads views through a real mount with the calls that programs use: `std::fs`, `pread` at odd
//! offsets, mmap.

mod common;

use std::os::unix::fs::FileExt;

use common::mount::Scratch;
use common::{
    Zeros, assert_same, config_of, copy_files, golden, shards_of, tensors_of, tensors_of_dir,
};

#[test]
fn every_family_equals_its_golden_data_through_a_mount() {
    let cases = [
        ("mimo-v2-flash", Zeros::Signed),
        ("deepseek-v4-flash", Zeros::Equal),
        ("deepseek-v4-base", Zeros::Signed),
        ("kimi-k25-vl", Zeros::Signed),
        ("qwen3-vl-moe", Zeros::Signed),
    ];
    let Some(scratch) = Scratch::new() else { return };
    for (folder, zeros) in cases {
        let source = golden(folder).join("checkpoint");
        let at = scratch.mount(folder, &source, &["--shard-size", "200KB"]);
        let expected = tensors_of(&golden(folder).join("native.safetensors"));
        assert_same(&tensors_of_dir(&at), &expected, zeros);
        assert!(shards_of(&at).len() > 1, "{folder}: one shard has no shard boundary");

        let index = std::fs::read(at.join("model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        let total: usize = expected.values().map(|(_, _, bytes)| bytes.len()).sum();
        assert_eq!(index["metadata"]["total_size"], total, "{folder}");
        let listed = index["weight_map"].as_object().unwrap();
        assert!(listed.keys().eq(expected.keys()), "{folder}");

        let config = config_of(&at);
        let within = [&config, &config["text_config"]];
        assert!(within.iter().all(|c| c.get("quantization_config").is_none()), "{folder}");
        let tokenizer = "tokenizer_config.json";
        assert_eq!(
            std::fs::read(at.join(tokenizer)).unwrap(),
            std::fs::read(source.join(tokenizer)).unwrap()
        );
    }
}

#[test]
fn any_way_of_reading_gives_the_same_bytes() {
    let source = golden("mimo-v2-flash").join("checkpoint");
    let Some(scratch) = Scratch::new() else { return };
    for (name, options) in [
        ("cache", &["--cache-size", "64MiB"][..]),
        ("no-cache", &["--cache-size", "0"]),
        ("direct-io", &["--direct-io"]),
    ] {
        let shard = &shards_of(&scratch.mount(name, &source, options))[0];
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
    let Some(scratch) = Scratch::new() else { return };
    let options = ["--cache-size", "1MiB", "--direct-io"];
    let shard = &shards_of(&scratch.mount("view", &source, &options))[0];
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
    let Some(scratch) = Scratch::new() else { return };
    let at = scratch.mount("all", &source, &["--ep-size", "2"]);
    let whole = tensors_of_dir(&at);
    for (rank, experts) in [(0, 0..2), (1, 2..3)] {
        let dir = format!("ep-{rank:04}-of-0002");
        for file in ["config.json", "tokenizer_config.json", "model.safetensors.index.json"] {
            assert!(at.join(&dir).join(file).exists(), "{dir}/{file}");
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
        assert_same(&tensors_of_dir(&at.join(&dir)), &expected, Zeros::Signed);

        let options = ["--ep-size", "2", "--ep-rank", &rank.to_string()];
        let alone = scratch.mount(&dir, &source, &options);
        assert_same(&tensors_of_dir(&alone), &expected, Zeros::Signed);
    }
}

#[test]
fn an_expert_shard_slices_axis_1() {
    let source = golden("qwen3-vl-moe").join("checkpoint");
    let options = ["--ep-shard-size", "4", "--ep-shard-rank", "1"];
    let Some(scratch) = Scratch::new() else { return };
    let shown = tensors_of_dir(&scratch.mount("view", &source, &options));
    let whole = tensors_of(&golden("qwen3-vl-moe").join("native.safetensors"));
    assert!(shown.keys().eq(whole.keys()));
    for (name, (_, shape, bytes)) in shown {
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
fn mounting_a_native_view_with_quantize_restores_the_checkpoint() {
    let Some(scratch) = Scratch::new() else { return };
    for (folder, options) in [("qwen3-vl-moe", &[][..]), ("deepseek-v4-base", &["--dtype", "f32"])]
    {
        let source = golden(folder).join("checkpoint");
        let native = scratch.mount(&format!("{folder}-native"), &source, options);
        let original = source.to_str().unwrap();
        let back = ["--to", "hf", "--quantize", "checkpoint", "--scales-from", original];
        let back = scratch.mount(&format!("{folder}-back"), &native, &back);
        let (got, expected) = (tensors_of_dir(&back), tensors_of_dir(&source));
        assert!(got.keys().eq(expected.keys()), "{folder}");
        for (name, tensor) in &expected {
            assert!(got[name] == *tensor, "{folder}: `{name}`");
        }
        assert_eq!(config_of(&back), config_of(&source), "{folder}");
    }
}

#[test]
fn a_truncated_shard_gives_eio_and_other_tensors_stay_readable() {
    let Some(scratch) = Scratch::new() else { return };
    let source = scratch.path().join("checkpoint");
    copy_files(&golden("mimo-v2-flash").join("checkpoint"), &source);
    let at = scratch.mount("view", &source, &[]);
    let shard = source.join("model-00003-of-00003.safetensors");
    std::fs::OpenOptions::new().write(true).open(&shard).unwrap().set_len(5000).unwrap();
    let error = std::fs::read(&shards_of(&at)[0]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    // Tensors in other shards can still be read.
    let whole = tensors_of(&golden("mimo-v2-flash").join("native.safetensors"));
    let name = "model.norm.weight";
    let one = at.join(".mount-ckpt/tensors").join(format!("{name}.safetensors"));
    assert!(tensors_of(&one)[name] == whole[name]);
}
