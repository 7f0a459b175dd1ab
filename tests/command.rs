//! The command line: exit codes, messages, and the subcommands that do not mount.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::mount::BINARY;
use common::{copy_files, golden, shards_of};

fn checkpoint() -> PathBuf {
    golden("qwen3-vl-moe").join("checkpoint")
}

fn run(args: &[&str]) -> Output {
    Command::new(BINARY).args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn exit_codes_distinguish_usage_errors_from_failures() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_str().unwrap();
    let absent = dir.path().join("absent");
    let absent = absent.to_str().unwrap();
    let checkpoint = checkpoint();
    let src = checkpoint.to_str().unwrap();
    let table: [(&[&str], i32, &str); 15] = [
        (&[], 2, "required arguments"),
        (&[src], 2, "<MNT>"),
        (&["--bogus", src, at], 2, "'--bogus'"),
        (&[src, at, "-o", "bogus"], 2, "`-o` has no option `bogus`"),
        (&[src, at, "-o", "rw"], 2, "read-only"),
        (&[src, at, "--ep-rank", "1"], 2, "--ep-size <N>"),
        (&["inspect", src, "--shard-size", "5XB"], 2, "expected one of the units"),
        (&["--to", "hf", "inspect", src], 2, "`inspect` has to come first"),
        (&[absent, at], 1, "absent"),
        (&[src, absent], 1, "does not exist: create it with `mkdir -p"),
        (&[src, src], 1, "is inside the checkpoint"),
        (&["inspect", at], 1, "config.json"),
        (&["status", at], 1, "is not mounted"),
        (&["umount", at], 1, "is not mounted"),
        (&["export", src, &format!("{src}/out")], 1, "is inside the checkpoint"),
    ];
    for (args, code, message) in table {
        let output = run(args);
        let printed = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {printed}");
        assert!(printed.contains(message), "{args:?}: {printed}");
        assert_eq!(stdout(&output), "", "{args:?}");
        if code == 1 {
            assert!(
                printed.starts_with("mount-ckpt: ") && printed.lines().count() == 1,
                "{printed}"
            );
        }
    }
}

#[test]
fn requested_output_goes_to_stdout() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint();
    let src = checkpoint.to_str().unwrap();
    let table: [(&[&str], &str); 9] = [
        (&["--help"], "Without a subcommand, mounts SRC at MNT"),
        (&["-h"], "--kv-scales <R>"),
        (&["-V"], concat!("mount-ckpt ", env!("CARGO_PKG_VERSION"), "\n")),
        (&["completions", "bash"], "_mount__ckpt"),
        (&["man"], ".TH mount-ckpt 1"),
        (&["models"], "qwen3_vl_moe"),
        (&["models", "--json"], "\"qwen3_vl_moe\""),
        (&["inspect", src], "lm_head.weight"),
        (&["umount", "--quiet", dir.path().to_str().unwrap()], ""),
    ];
    for (args, text) in table {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        assert!(stdout(&output).contains(text), "{args:?}: {}", stdout(&output));
        assert_eq!(stderr(&output), "", "{args:?}");
    }
    let plan = run(&["inspect", src, "--json"]);
    assert!(serde_json::from_slice::<serde_json::Value>(&plan.stdout).unwrap().is_object());
}

#[test]
fn the_long_version_names_commit_target_and_kernels() {
    assert_eq!(stdout(&run(&["-V"])), concat!("mount-ckpt ", env!("CARGO_PKG_VERSION"), "\n"));
    let printed = stdout(&run(&["--version"]));
    let (first, second) = printed.trim_end().split_once('\n').unwrap();
    assert_eq!(first, concat!("mount-ckpt ", env!("CARGO_PKG_VERSION")));

    // The commit of the checkout in which this test was compiled. A package has none.
    let git = Command::new("git")
        .args(["-c", "safe.directory=*", "rev-parse", "--short", "HEAD"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output();
    let head = git.ok().filter(|git| git.status.success()).map(|git| stdout(&git));
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join(".git").exists();
    let commit = head.filter(|_| checkout).unwrap_or("unknown".to_owned());
    let (built, kernels) = second.split_once(", kernels: ").unwrap();
    let target = built.strip_prefix(&format!("commit {}, ", commit.trim())).unwrap();
    assert!(target.starts_with(std::env::consts::ARCH), "{printed}");

    let (names, used) = kernels.strip_suffix(" is used)").unwrap().split_once(" (").unwrap();
    let names: Vec<&str> = names.split(", ").collect();
    assert_eq!((names[0], names[names.len() - 1]), (used, "portable"), "fastest first");
    // A manual page may be generated on another machine than the one it is read on.
    assert!(!stdout(&run(&["man"])).contains("kernels:"));
}

#[test]
fn verify_reads_everything_and_finds_a_truncated_shard() {
    let dir = tempfile::tempdir().unwrap();
    let broken = dir.path().join("checkpoint");
    copy_files(&checkpoint(), &broken);
    let whole = run(&["verify", broken.to_str().unwrap(), "--json"]);
    assert_eq!(whole.status.code(), Some(0), "{}", stderr(&whole));
    let verdict: serde_json::Value = serde_json::from_slice(&whole.stdout).unwrap();
    assert_eq!((&verdict["ok"], &verdict["failures"]), (&true.into(), &0.into()));
    assert!(verdict["bytes"].as_u64().unwrap() > 500_000, "{verdict}");

    let shard = broken.join("model-00002-of-00003.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 100]).unwrap();
    let output = run(&["verify", broken.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("model-00002-of-00003.safetensors"), "{}", stderr(&output));
}

#[test]
fn an_interrupted_export_is_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("deep/out");
    let checkpoint = checkpoint();
    let args = ["export", checkpoint.to_str().unwrap(), out.to_str().unwrap()];
    let first = run(&args);
    assert_eq!(first.status.code(), Some(0), "{}", stderr(&first));
    let (shard, config) = (shards_of(&out).remove(0), out.join("config.json"));
    let (whole, before) = (fs::read(&shard).unwrap(), inode(&config));

    // The state after an export was killed: one file half written, under its temporary name.
    fs::write(shard.with_extension("safetensors.partial"), &whole[..whole.len() / 2]).unwrap();
    fs::remove_file(&shard).unwrap();
    let second = run(&args);
    assert!(stdout(&second).contains("files written: 1 "), "{}", stdout(&second));
    assert_eq!(fs::read(&shard).unwrap(), whole);
    assert!(!shard.with_extension("safetensors.partial").exists());
    assert_eq!(inode(&config), before, "a complete file is kept");

    let third = run(&args);
    assert!(stdout(&third).contains("files written: 0 "), "{}", stdout(&third));

    let other = dir.path().join("other");
    copy_files(&checkpoint, &other);
    let output = run(&["export", other.to_str().unwrap(), out.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("holds an export of another checkpoint"));
}

fn inode(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap())
}
