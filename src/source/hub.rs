//! Finds the checkpoint directory that a user means, also in the local cache of the Hugging Face
//! hub. Nothing is downloaded.
//!
//! An entry of the cache is a directory `models--ORG--NAME` with:
//!
//! - `refs/main`, which holds a commit,
//! - `snapshots/COMMIT/…`, symlinks to the files of that commit,
//! - `blobs/…`, the files; a file that is still being downloaded ends in `.incomplete`.

use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use super::error::SourceError;

/// The checkpoint directory that `src` names. `src` is a directory, an entry of the hub cache, or
/// the name of a model (`org/name`) that is looked up in the hub cache. Of an entry, the snapshot
/// is taken that `refs/main` names, or the only one.
///
/// The cache is the first of these that is set: HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, `hub` in
/// HF_HOME, `huggingface/hub` in XDG_CACHE_HOME, `~/.cache/huggingface/hub`.
///
/// # Errors
/// If there is no such directory or model, or no snapshot can be chosen.
pub fn resolve(src: &str) -> Result<PathBuf, SourceError> {
    resolve_with(src, |name| std::env::var_os(name))
}

/// Does what [`resolve`] does, with `env` for the environment variables.
pub(super) fn resolve_with(
    src: &str,
    env: impl Fn(&str) -> Option<OsString>,
) -> Result<PathBuf, SourceError> {
    let path = Path::new(src);
    if path.is_dir() {
        return if is_cache_entry(path) { snapshot(path) } else { Ok(path.to_owned()) };
    }
    if path.exists() {
        return Err(SourceError::NotADirectory { path: path.to_owned() });
    }
    let Some(entry) = cache_entry_name(src) else {
        return Err(SourceError::NoDirectory { path: path.to_owned() });
    };
    let mut looked = vec![path.to_owned()];
    if let Some(cache) = cache_dir(env) {
        let entry = cache.join(entry);
        if entry.is_dir() {
            return snapshot(&entry);
        }
        looked.push(entry);
    }
    Err(SourceError::NotFound { src: src.to_owned(), looked })
}

/// Name of the cache entry for `org/name`, `name` or `models--org--name`; `None` if `src` cannot be
/// the name of a model.
fn cache_entry_name(src: &str) -> Option<String> {
    let word = |s: &str| {
        !s.is_empty()
            && !s.starts_with('.')
            && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    match src.split_once('/') {
        Some((org, name)) => (word(org) && word(name)).then(|| format!("models--{org}--{name}")),
        None if src.starts_with("models--") => word(src).then(|| src.to_owned()),
        None => word(src).then(|| format!("models--{src}")),
    }
}

/// The directory in which huggingface_hub keeps its cache, by the same environment variables as its
/// `constants.py`.
fn cache_dir(env: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| env(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = set("HOME");
    let expand = |path: PathBuf| match (path.strip_prefix("~"), &home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    };
    if let Some(cache) = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")) {
        return Some(expand(cache));
    }
    let hf_home = set("HF_HOME").or_else(|| {
        let caches = set("XDG_CACHE_HOME").or_else(|| Some(home.as_ref()?.join(".cache")))?;
        Some(caches.join("huggingface"))
    })?;
    Some(expand(hf_home).join("hub"))
}

fn is_cache_entry(dir: &Path) -> bool {
    dir.join("snapshots").is_dir() && !dir.join("config.json").exists()
}

/// The snapshot of a cache entry that `refs/main` names; without that file, the only one.
fn snapshot(entry: &Path) -> Result<PathBuf, SourceError> {
    let dir = entry.join("snapshots");
    let mut names: Vec<String> = fs::read_dir(&dir)
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.') && dir.join(name).is_dir())
        .collect();
    names.sort();
    let refuse = |problem: String| SourceError::Snapshot {
        entry: entry.to_owned(),
        problem,
        snapshots: names.iter().map(|name| format!("`{name}`")).collect(),
    };
    let reference = entry.join("refs").join("main");
    match (fs::read_to_string(&reference), names.as_slice()) {
        (Ok(commit), _) => {
            let commit = commit.trim();
            if names.iter().any(|name| name == commit) {
                Ok(dir.join(commit))
            } else {
                Err(refuse(format!("`refs/main` names `{commit}`, which is not there")))
            }
        }
        (Err(_), [only]) => Ok(dir.join(only)),
        (Err(_), []) => Err(refuse("it has no snapshot".to_owned())),
        (Err(_), several) => {
            Err(refuse(format!("no `refs/main`, and {} snapshots", several.len())))
        }
    }
}

/// Number of unfinished downloads of a checkpoint directory: those of `hf download --local-dir`,
/// and those of the cache entry if the directory is a snapshot.
pub(super) fn partial_downloads(dir: &Path) -> usize {
    let mut count = count_partial(&dir.join(".cache/huggingface/download"), 4);
    let mut ancestors = dir.ancestors().skip(1);
    if let (Some(snapshots), Some(entry)) = (ancestors.next(), ancestors.next())
        && snapshots.components().next_back() == Some(Component::Normal("snapshots".as_ref()))
    {
        count += count_partial(&entry.join("blobs"), 0);
    }
    count
}

fn count_partial(dir: &Path, depth: usize) -> usize {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth > 0 => count_partial(&entry.path(), depth - 1),
            Ok(_) if entry.file_name().as_encoded_bytes().ends_with(b".incomplete") => 1,
            _ => 0,
        })
        .sum()
}
