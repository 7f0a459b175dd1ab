//! Tests of the hub cache: snapshots of links into `blobs/`, and the look-up of model names.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use crate::source::hub::resolve_with;
use crate::source::testing::{Dir, safetensors};
use crate::source::{Checkpoint, SourceError};
use crate::tensor::DType;

const ENTRY: &str = "hub/models--org--name";

/// A hub cache with one entry, whose snapshot `c1` consists of links into `blobs/`.
fn cache() -> Dir {
    let shard = safetensors(&[("x", DType::U8, &[2], vec![3, 4])]);
    let dir = Dir::new()
        .file(&format!("{ENTRY}/blobs/aa"), "{\"model_type\": \"m\"}")
        .file(&format!("{ENTRY}/blobs/bb"), shard)
        .file(&format!("{ENTRY}/refs/main"), "c1");
    let snapshot = dir.join(&format!("{ENTRY}/snapshots/c1"));
    fs::create_dir_all(&snapshot).expect("writable");
    symlink("../../blobs/aa", snapshot.join("config.json")).expect("a link can be made");
    symlink("../../blobs/bb", snapshot.join("model.safetensors")).expect("a link can be made");
    dir
}

fn resolve(src: &str, env: &[(&str, PathBuf)]) -> Result<PathBuf, SourceError> {
    let env: BTreeMap<&str, OsString> =
        env.iter().map(|(name, path)| (*name, path.clone().into_os_string())).collect();
    resolve_with(src, |name| env.get(name).cloned())
}

#[test]
fn a_snapshot_of_links_is_a_checkpoint() {
    let dir = cache();
    let checkpoint = Checkpoint::open(&dir.join(&format!("{ENTRY}/snapshots/c1")))
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(checkpoint.config().model_type(), Some("m"));
    assert_eq!(checkpoint.shards()[0].name(), "model.safetensors");
    assert!(checkpoint.shards()[0].path().ends_with("blobs/bb"));
    let mut out = [0; 2];
    checkpoint.read(checkpoint.find("x").expect("stored"), 0, &mut out).expect("readable");
    assert_eq!(out, [3, 4]);
}

#[test]
fn an_incomplete_snapshot_counts_its_unfinished_downloads() {
    let dir = cache()
        .file(&format!("{ENTRY}/blobs/cc.incomplete"), "")
        .file(&format!("{ENTRY}/blobs/dd.incomplete"), "");
    let snapshot = dir.join(&format!("{ENTRY}/snapshots/c1"));
    fs::remove_file(snapshot.join("model.safetensors")).expect("there");
    let got = Checkpoint::open(&snapshot).expect_err("no shard").to_string();
    assert!(
        got.ends_with("; 2 `*.incomplete` downloads are there, run `hf download` again"),
        "{got}"
    );
}

#[test]
fn names_are_looked_up_in_the_cache_that_the_environment_names() {
    let dir = cache();
    let hub = dir.join("hub");
    let snapshot = hub.join("models--org--name/snapshots/c1");
    let home = Dir::new();
    fs::create_dir_all(home.join(".cache/huggingface")).expect("writable");
    symlink(&hub, home.join(".cache/huggingface/hub")).expect("a link can be made");
    let elsewhere = PathBuf::from("/nowhere");
    let environments: [&[(&str, PathBuf)]; 6] = [
        &[("HF_HUB_CACHE", hub.clone()), ("HF_HOME", elsewhere.clone())],
        &[("HUGGINGFACE_HUB_CACHE", hub.clone())],
        &[("HF_HOME", dir.path().to_owned()), ("HOME", elsewhere.clone())],
        &[("HF_HOME", PathBuf::new()), ("HOME", home.path().to_owned())],
        &[("HF_HUB_CACHE", "~/.cache/huggingface/hub".into()), ("HOME", home.path().to_owned())],
        &[("XDG_CACHE_HOME", home.join(".cache"))],
    ];
    for env in environments {
        for src in ["org/name", "models--org--name"] {
            let got = resolve(src, env).unwrap_or_else(|e| panic!("{env:?}: {e}"));
            assert_eq!(got.canonicalize().expect("there"), snapshot.canonicalize().expect("there"));
        }
    }
}

#[test]
fn a_path_needs_no_environment() {
    let dir = cache();
    let snapshot = dir.join(&format!("{ENTRY}/snapshots/c1"));
    for path in [dir.join(ENTRY), snapshot.clone()] {
        let got = resolve(path.to_str().expect("UTF-8"), &[]).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(got, snapshot);
    }
    let got = resolve(dir.path().to_str().expect("UTF-8"), &[]).expect("a directory");
    assert_eq!(got, dir.path());
}

#[test]
fn the_snapshot_must_be_unambiguous() {
    type Case<'a> = (&'a [&'a str], Option<&'a str>, Result<&'a str, &'a str>);
    let cases: [Case<'_>; 6] = [
        (&["c1"], None, Ok("c1")),
        (&["c1", "c2"], Some("c2\n"), Ok("c2")),
        (
            &["c1", "c2"],
            None,
            Err("(no `refs/main`, and 2 snapshots): give one of its `snapshots` \
                 directories: `c1`; `c2`"),
        ),
        (
            &["c1"],
            Some("c9"),
            Err("(`refs/main` names `c9`, which is not there): give one of its `snapshots` \
                 directories: `c1`"),
        ),
        (&["c1"], Some("../../x"), Err("(`refs/main` names `../../x`, which is not there)")),
        (&[], None, Err("(it has no snapshot)")),
    ];
    for (snapshots, main, expected) in cases {
        let mut dir = Dir::new().file("models--a--b/blobs/x", "");
        fs::create_dir_all(dir.join("models--a--b/snapshots")).expect("writable");
        for name in snapshots {
            dir = dir.file(&format!("models--a--b/snapshots/{name}/config.json"), "{}");
        }
        if let Some(main) = main {
            dir = dir.file("models--a--b/refs/main", main);
        }
        let got = resolve("a/b", &[("HF_HUB_CACHE", dir.path().to_owned())]);
        match (got, expected) {
            (Ok(got), Ok(name)) => {
                assert_eq!(got, dir.join(&format!("models--a--b/snapshots/{name}")));
            }
            (Err(got), Err(part)) => assert!(got.to_string().contains(part), "{got}"),
            (got, expected) => panic!("expected {expected:?}, got {got:?}"),
        }
    }
}

#[test]
fn a_missing_source_says_where_it_was_looked_for() {
    let env = [("HF_HUB_CACHE", PathBuf::from("/cache"))];
    for (src, expected) in [
        (
            "org/none",
            "`org/none` is neither a directory nor a model in the local hub cache (looked for \
             `org/none`, `/cache/models--org--none`); nothing is downloaded: fetch it with \
             `hf download org/none`, or set HF_HUB_CACHE where the cache is elsewhere",
        ),
        (
            "none",
            "`none` is neither a directory nor a model in the local hub cache (looked for \
             `none`, `/cache/models--none`); nothing is downloaded: \
             set HF_HUB_CACHE where the cache is elsewhere",
        ),
        ("/no/such/dir", "`/no/such/dir` does not exist: expected a checkpoint directory"),
        ("../x", "`../x` does not exist: expected a checkpoint directory"),
        ("", "`` does not exist: expected a checkpoint directory"),
        ("/dev/null", "`/dev/null` is not a directory: give the checkpoint directory itself"),
    ] {
        assert_eq!(resolve(src, &env).expect_err("nowhere").to_string(), expected);
    }
}
