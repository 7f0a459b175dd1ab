//! The loaders that people use, from PyPI and unmodified, on real mounts. The scripts and what each
//! proves are in `tests/loaders`.
//!
//! Needs /dev/fuse, `python3` with `venv`, and PyPI once for each set of requirements; says so
//! where they are missing, and fails under CI.

#[path = "loaders/environment.rs"]
mod environment;
#[path = "loaders/place.rs"]
mod place;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use environment::Python;
use place::Place;

const GOLDEN: [&str; 10] = [
    "mimo-v2-flash",
    "deepseek-v4-flash",
    "deepseek-v4-base",
    "kimi-k25-vl",
    "qwen3-vl-moe",
    "deepseek-v3",
    "qwen3-moe",
    "glm4-moe",
    "minimax-m2",
    "gpt-oss",
];

/// The families with a native layout of their own, as tests/reference names them.
const SEEDS: [&str; 4] = ["mimo-v2-flash", "deepseek-v4", "kimi-k25-vl", "qwen3-vl-moe"];

/// The families of tests/reference.
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

/// Says on stderr itself what the harness would capture: that something was not tested, and why.
fn aloud(what: &str) {
    std::io::stderr().write_all(format!("{what}\n").as_bytes()).unwrap();
}

/// A path of the repository.
fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn golden(folder: &str) -> PathBuf {
    here("tests/golden").join(folder)
}

/// Runs a command to its end, shows what it printed, and fails with it.
fn must(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    println!("{out}");
    out.into_owned()
}

/// Checkpoints as published, toy size, made by transformers_views.py once in a run of the tests.
fn reference() -> Option<&'static Path> {
    static MADE: OnceLock<Option<tempfile::TempDir>> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let script = here("tests/reference/transformers_views.py");
        must(Python::Base.command()?.arg(script).arg("make").arg(dir.path()));
        Some(dir)
    });
    made.as_ref().map(tempfile::TempDir::path)
}

/// `GOLDEN=MOUNT` for every golden folder, mounted in its native layout.
fn golden_mounts(place: &Place) -> Vec<String> {
    let mount = |folder: &&str| {
        // Several shards, with tensors that share one and tensors that have their own.
        let options = ["--to", "native", "--shard-size", "300kB"];
        let at = place.mount(folder, golden(folder).join("checkpoint"), &options);
        format!("{}={}", golden(folder).display(), at.display())
    };
    GOLDEN.iter().map(mount).collect()
}

#[test]
fn safetensors_reads_every_golden_view() {
    let (Some(place), Some(mut script)) =
        (Place::new(), Python::Base.script("safetensors_files.py"))
    else {
        return;
    };
    must(script.args(golden_mounts(&place)));
}

#[test]
fn streamers_read_every_golden_view() {
    let (Some(place), Some(mut script)) =
        (Place::new(), Python::Base.script("weight_streamers.py"))
    else {
        return;
    };
    must(script.args(golden_mounts(&place)));
}

#[test]
fn transformers_loads_its_own_layout_and_the_published_names() {
    let (Some(place), Some(reference)) = (Place::new(), reference()) else { return };
    let mut script = Python::Base.script("transformers_classes.py").unwrap();
    script.arg(reference);
    for family in FAMILIES {
        let checkpoint = reference.join(family).join("checkpoint");
        let mount = |to: &str| {
            let at = place.mount(&format!("{family}-{to}"), &checkpoint, &["--to", to]);
            at.display().to_string()
        };
        script.arg(format!("{family}={}={}", mount("transformers"), mount("hf")));
    }
    must(&mut script);
}

#[test]
fn ranks_of_dcp_read_their_experts_alone() {
    let (Some(place), Some(mut make)) = (Place::new(), Python::Base.script("dcp_experts.py"))
    else {
        return;
    };
    must(make.arg("make").arg(place.path()));
    let checkpoint = place.path().join("checkpoint");
    let readers = [
        (Python::Base, "torch.distributed.checkpoint:HuggingFaceStorageReader"),
        (
            Python::Automodel,
            "nemo_automodel.components.checkpoint._backports.hf_storage:_HuggingFaceStorageReader",
        ),
    ];
    for (python, reader) in readers {
        // New mounts, since a second reader would find the first one's pages in the kernel.
        let place = Place::new().unwrap();
        let mut script = python.script("dcp_experts.py").unwrap();
        script.arg("load").arg(&checkpoint);
        for rank in ["rank-0", "rank-1"] {
            script.arg(place.mount(rank, &checkpoint, &["--read-ahead", "512KiB"]));
        }
        script.arg(place.mount("slices", &checkpoint, &["--ep-size", "2"]));
        must(script.arg(reader));
    }
}

#[test]
fn automodel_agrees_with_and_loads_native_views() {
    let (Some(place), Some(reference)) = (Place::new(), reference()) else { return };
    let mut script = Python::Automodel.script("automodel.py").unwrap();
    for family in SEEDS {
        let checkpoint = reference.join(family).join("checkpoint");
        let mount = place.mount(family, &checkpoint, &["--to", "native"]);
        let mut argument = format!("{family}={}={}", checkpoint.display(), mount.display());
        if family == "mimo-v2-flash" {
            let view = place.mount("mimo-automodel", &checkpoint, &["--kv-scales", "automodel"]);
            argument += &format!("={}", view.display());
        }
        script.arg(argument);
    }
    must(&mut script);
}

#[test]
fn the_examples_load_a_view() {
    let (Some(place), Some(reference)) = (Place::new(), reference()) else { return };
    let checkpoint = reference.join("deepseek-v4/checkpoint");
    let mut example = Python::Base.command().unwrap();
    example.arg(here("examples/load_transformers.py"));
    must(example.arg(place.mount("transformers", &checkpoint, &["--to", "transformers"])));

    let mut example = Python::Base.command().unwrap();
    // Both ranks are here, whatever the machine's name resolves to.
    example.env("GLOO_SOCKET_IFNAME", "lo");
    // What torchrun is.
    example.args(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]);
    example.arg(here("examples/load_dcp.py"));
    let said = must(example.arg(place.mount("native", &checkpoint, &["--to", "native"])));
    assert!(said.contains("rank 0 of 2") && said.contains("rank 1 of 2"), "{said}");
}

#[test]
fn an_entry_of_the_hub_cache_is_a_source() {
    let (Some(place), Some(mut make)) = (Place::new(), Python::Base.script("hub_cache.py")) else {
        return;
    };
    let folder = golden("mimo-v2-flash");
    let cache = place.path().join("hub");
    make.arg(folder.join("checkpoint")).arg(&cache).arg("XiaomiMiMo/MiMo-V2-Flash");
    let snapshot = must(&mut make);
    let hub = [("HF_HUB_CACHE", cache.as_path())];
    let entry = cache.join("models--XiaomiMiMo--MiMo-V2-Flash");
    let mut script = Python::Base.script("safetensors_files.py").unwrap();
    for at in [
        place.mount_with("name", "XiaomiMiMo/MiMo-V2-Flash", &[], &hub),
        place.mount("entry", entry, &[]),
        place.mount("snapshot", snapshot.trim(), &[]),
    ] {
        script.arg(format!("{}={}", folder.display(), at.display()));
    }
    must(&mut script);
}

#[test]
fn tools_copy_and_check_the_right_bytes() {
    let Some(place) = Place::new() else { return };
    for tool in ["rsync", "python3"] {
        if Command::new(tool).arg("--version").output().is_err() {
            assert!(std::env::var_os("CI").is_none(), "CI has to have {tool}");
            aloud(&format!("NOT TESTED: {tool} is missing"));
            return;
        }
    }
    let checkpoint = golden("mimo-v2-flash").join("checkpoint");
    let options = ["--to", "native", "--shard-size", "300kB"];
    let mut script = Command::new(here("tests/loaders/file_tools.sh"));
    script.arg(place.export("export", &checkpoint, &options));
    script.arg(place.mount("native", &checkpoint, &options)).arg(place.path());
    must(&mut script);
}
