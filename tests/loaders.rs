//! The unmodified loaders from PyPI on real mounts. `tests/loaders/README.md` describes the
//! scripts.
//!
//! Most of these tests are ignored, since the first one installs the loaders (about 6 GB). `cargo
//! test --test loaders -- --ignored` runs them. They need `/dev/fuse`, `python3` with `venv`, and
//! PyPI once for each set of requirements. If something is missing, they print that they were
//! skipped; with `CI` set they fail.

mod common;
#[path = "loaders/environment.rs"]
mod environment;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread;

use common::mount::{BINARY, Scratch, not_tested};
use common::{FAMILIES as GOLDEN, golden};
use environment::Python;

/// Families with a native layout of their own, under their names in tests/reference.
const ADAPTER_FAMILIES: [&str; 4] = ["mimo-v2-flash", "deepseek-v4", "kimi-k25-vl", "qwen3-vl-moe"];

/// All families of tests/reference.
const FAMILIES: [&str; 10] = [
    "mimo-v2-flash",
    "deepseek-v4",
    "deepseek-v4-base",
    "kimi-k25-vl",
    "qwen3-vl-moe",
    "deepseek-v3",
    "qwen3-moe",
    "glm4-moe",
    "minimax-m2",
    "gpt-oss",
];

/// The path of a file of the repository.
fn in_repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Runs a command, prints its stdout, and panics if it fails.
fn run_checked(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    println!("{out}");
    out.into_owned()
}

/// Published checkpoints at toy size. transformers_views.py writes them once per run of the tests.
fn reference() -> Option<&'static Path> {
    static MADE: OnceLock<Option<tempfile::TempDir>> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let script = in_repository("tests/reference/transformers_views.py");
        run_checked(Python::Base.command()?.arg(script).arg("make").arg(dir.path()));
        Some(dir)
    });
    made.as_ref().map(tempfile::TempDir::path)
}

/// `GOLDEN=MOUNT` for every golden folder, mounted in its native layout.
fn golden_mounts(scratch: &Scratch) -> Vec<String> {
    let mount = |folder: &&str| {
        // A shard size that puts several tensors into some shards and one tensor into others.
        let options = ["--to", "native", "--shard-size", "300kB"];
        let at = scratch.mount(folder, golden(folder).join("checkpoint"), &options);
        format!("{}={}", golden(folder).display(), at.display())
    };
    GOLDEN.iter().map(mount).collect()
}

#[test]
#[ignore = "installs PyTorch and other loaders, about 6 GB"]
fn safetensors_reads_every_golden_view() {
    let (Some(scratch), Some(mut script)) =
        (Scratch::new(), Python::Base.script("safetensors_files.py"))
    else {
        return;
    };
    run_checked(script.args(golden_mounts(&scratch)));
}

#[test]
#[ignore = "installs PyTorch and other loaders, about 6 GB"]
fn streamers_read_every_golden_view() {
    let (Some(scratch), Some(mut script)) =
        (Scratch::new(), Python::Base.script("weight_streamers.py"))
    else {
        return;
    };
    run_checked(script.args(golden_mounts(&scratch)));
}

#[test]
#[ignore = "installs PyTorch and other loaders, about 6 GB"]
fn transformers_loads_its_own_layout_and_the_published_names() {
    let (Some(scratch), Some(reference)) = (Scratch::new(), reference()) else { return };
    let mut script = Python::Base.script("transformers_classes.py").unwrap();
    script.arg(reference);
    for family in FAMILIES {
        let checkpoint = reference.join(family).join("checkpoint");
        let mount = |to: &str| {
            let at = scratch.mount(&format!("{family}-{to}"), &checkpoint, &["--to", to]);
            at.display().to_string()
        };
        script.arg(format!("{family}={}={}", mount("transformers"), mount("hf")));
    }
    run_checked(&mut script);
}

#[test]
#[ignore = "installs PyTorch and other loaders, about 6 GB"]
fn dcp_ranks_read_only_their_experts() {
    let (Some(scratch), Some(mut make)) = (Scratch::new(), Python::Base.script("dcp_experts.py"))
    else {
        return;
    };
    run_checked(make.arg("make").arg(scratch.path()));
    let checkpoint = scratch.path().join("checkpoint");
    let readers = [
        (Python::Base, "torch.distributed.checkpoint:HuggingFaceStorageReader"),
        (
            Python::Automodel,
            "nemo_automodel.components.checkpoint._backports.hf_storage:_HuggingFaceStorageReader",
        ),
    ];
    for (python, reader) in readers {
        // New mounts for each reader, since the pages of the first one stay in the page cache.
        let scratch = Scratch::new().unwrap();
        let mut script = python.script("dcp_experts.py").unwrap();
        script.arg("load").arg(&checkpoint);
        for rank in ["rank-0", "rank-1"] {
            script.arg(scratch.mount(rank, &checkpoint, &["--read-ahead", "512KiB"]));
        }
        script.arg(scratch.mount("slices", &checkpoint, &["--ep-size", "2"]));
        run_checked(script.arg(reader));
    }
}

#[test]
#[ignore = "installs PyTorch and other loaders, about 6 GB"]
fn automodel_agrees_with_and_loads_native_views() {
    let (Some(scratch), Some(reference)) = (Scratch::new(), reference()) else { return };
    let mut script = Python::Automodel.script("automodel.py").unwrap();
    for family in ADAPTER_FAMILIES {
        let checkpoint = reference.join(family).join("checkpoint");
        let mount = scratch.mount(family, &checkpoint, &["--to", "native"]);
        let mut argument = format!("{family}={}={}", checkpoint.display(), mount.display());
        if family == "mimo-v2-flash" {
            let view = scratch.mount("mimo-automodel", &checkpoint, &["--kv-scales", "automodel"]);
            argument += &format!("={}", view.display());
        }
        script.arg(argument);
    }
    run_checked(&mut script);
}

#[test]
#[ignore = "installs PyTorch and other loaders, about 6 GB"]
fn saves_of_training_libraries_come_back_as_published() {
    let (Some(scratch), Some(reference)) = (Scratch::new(), reference()) else { return };
    let saves = scratch.path().join("saves");
    let mut transformers = Python::Base.script("saves.py").unwrap();
    transformers.arg("make").arg(reference).arg(&saves);
    let mut automodel = Python::Automodel.script("automodel_saves.py").unwrap();
    automodel.arg(reference).arg(&saves);
    // Base has the same class and names as Flash.
    for family in FAMILIES.into_iter().filter(|family| *family != "deepseek-v4-base") {
        let checkpoint = reference.join(family).join("checkpoint");
        let in_memory =
            scratch.mount(&format!("{family}-in-memory"), &checkpoint, &["--to", "transformers"]);
        let published = scratch.mount(&format!("{family}-published"), &checkpoint, &["--to", "hf"]);
        transformers.arg(format!("{family}={}={}", in_memory.display(), published.display()));
        automodel.arg(format!("{family}={}", published.display()));
    }
    let made = thread::scope(|scope| {
        let other = scope.spawn(|| run_checked(&mut automodel));
        run_checked(&mut transformers) + &other.join().unwrap()
    });
    let mut check = Python::Base.script("saves.py").unwrap();
    check.arg("check").arg(reference).arg(&saves);
    // Collect all failures, since one change to a mapping shows in several saves.
    let mut refused = Vec::new();
    for save in made.lines() {
        let name = save.replace('/', "-");
        match scratch.try_mount(&name, saves.join(save), &["--to", "hf"]) {
            Ok(at) => _ = check.arg(format!("{save}={}", at.display())),
            Err(why) => refused.push(format!("{save}: {why}")),
        }
    }
    let refused = refused.join("\n");
    let output = check.output().unwrap();
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && refused.is_empty(), "{wrong}\nrefused:\n{refused}");
    print!("{}", String::from_utf8_lossy(&output.stdout));

    // Without the file of one rank, the remaining pieces of some tensors look like whole tensors.
    for family in ["mimo-v2-flash", "gpt-oss"] {
        let save = saves.join(family).join("automodel/native-2-ranks/model");
        fs::remove_dir_all(save.join("consolidated")).unwrap();
        for gone in [1, 2] {
            let lost = save.join(format!("shard-{gone:05}-model-00001-of-00001.safetensors"));
            let aside = lost.with_extension("aside");
            fs::rename(&lost, &aside).unwrap();
            let name = format!("{family}-without-{gone}");
            let mounted = scratch.try_mount(&name, &save, &["--to", "hf"]);
            assert!(mounted.is_err(), "{family} was mounted without `{}`", lost.display());
            fs::rename(&aside, &lost).unwrap();
        }
    }
}

#[test]
#[ignore = "installs PyTorch and other loaders, about 6 GB"]
fn the_examples_load_a_view() {
    let (Some(scratch), Some(reference)) = (Scratch::new(), reference()) else { return };
    let checkpoint = reference.join("deepseek-v4/checkpoint");
    let mut example = Python::Base.command().unwrap();
    example.arg(in_repository("examples/load_transformers.py"));
    run_checked(example.arg(scratch.mount("transformers", &checkpoint, &["--to", "transformers"])));

    let mut example = Python::Base.command().unwrap();
    // Both ranks run on this machine, whatever its host name resolves to.
    example.env("GLOO_SOCKET_IFNAME", "lo");
    // The module behind the command torchrun.
    example.args(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]);
    example.arg(in_repository("examples/load_dcp.py"));
    let printed =
        run_checked(example.arg(scratch.mount("native", &checkpoint, &["--to", "native"])));
    assert!(printed.contains("rank 0 of 2") && printed.contains("rank 1 of 2"), "{printed}");
}

#[test]
#[ignore = "installs PyTorch and other loaders, about 6 GB"]
fn an_entry_of_the_hub_cache_is_a_source() {
    let (Some(scratch), Some(mut make)) = (Scratch::new(), Python::Base.script("hub_cache.py"))
    else {
        return;
    };
    let folder = golden("mimo-v2-flash");
    let cache = scratch.path().join("hub");
    make.arg(folder.join("checkpoint")).arg(&cache).arg("XiaomiMiMo/MiMo-V2-Flash");
    let snapshot = run_checked(&mut make);
    let mut by_name = scratch.command("name", "XiaomiMiMo/MiMo-V2-Flash", &[]);
    run_checked(by_name.env("HF_HUB_CACHE", &cache));
    let entry = cache.join("models--XiaomiMiMo--MiMo-V2-Flash");
    let mut script = Python::Base.script("safetensors_files.py").unwrap();
    for at in [
        scratch.mount_point("name"),
        scratch.mount("entry", entry, &[]),
        scratch.mount("snapshot", snapshot.trim(), &[]),
    ] {
        script.arg(format!("{}={}", folder.display(), at.display()));
    }
    run_checked(&mut script);
}

#[test]
fn tools_copy_and_check_the_right_bytes() {
    let Some(scratch) = Scratch::new() else { return };
    for tool in ["rsync", "python3"] {
        if Command::new(tool).arg("--version").output().is_err() {
            not_tested(&format!("{tool} is missing"));
            return;
        }
    }
    let checkpoint = golden("mimo-v2-flash").join("checkpoint");
    let options = ["--to", "native", "--shard-size", "300kB"];
    let export = scratch.path().join("export");
    run_checked(Command::new(BINARY).arg("export").args(options).arg(&checkpoint).arg(&export));
    let mut script = Command::new(in_repository("tests/loaders/file_tools.sh"));
    script.arg(export);
    script.arg(scratch.mount("native", &checkpoint, &options)).arg(scratch.path());
    run_checked(&mut script);
}
