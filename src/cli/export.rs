//! `export`: the files of a view written to a directory, without FUSE.
//!
//! A file is written as `NAME.partial` and renamed when it is complete, the index last of all: what
//! a loader finds is whole. [`MARKER`] says what the directory holds, so that an export that was
//! interrupted goes on only as the same one.

use super::args::ExportArgs;
use super::open;
use super::output;
use super::pieces::for_each_piece;
use super::progress::{bar, rate};
use super::request::ViewRequest;
use crate::read::{Engine, EngineOptions};
use crate::tensor::{ByteSize, to_u64};
use crate::view::{Ino, Kind, View};
use anyhow::{Context as _, bail, ensure};
use indicatif::ProgressBar;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// File in the directory that says which view it holds. Hidden, so that no loader takes it up.
const MARKER: &str = ".mount-ckpt-export.json";

/// A file of a view, to be copied.
#[derive(Clone, Debug)]
struct ViewFile {
    /// Path below the root of the view.
    path: PathBuf,
    ino: Ino,
    bytes: u64,
}

/// Writes a view to a directory.
///
/// # Errors
/// Where there is no such view, the directory cannot be had, is inside the checkpoint, holds
/// something else or has too little room, or a byte cannot be read or written.
pub(super) fn run(
    args: &ExportArgs,
    view: &ViewRequest,
    options: EngineOptions,
) -> anyhow::Result<()> {
    let source = open::locate(&args.src)?;
    let out = absolute(&args.out)?;
    ensure!(
        !out.starts_with(&source),
        "`{}` is inside the checkpoint `{}`: give a directory outside",
        out.display(),
        source.display()
    );
    let (checkpoint, plan) = open::plan(view)?;
    let engine = Arc::new(Engine::new(checkpoint, Arc::clone(&plan), options));
    let view = View::new(engine, &view.files)?;
    let files = in_writing_order(files(&view)?);
    let marker = marker(&source, &plan.to_json(), &files)?;
    claim(&out, &marker)?;
    let missing = missing(&out, &files)?;
    let progress = bar("export", missing.iter().map(|file| file.bytes).sum());
    let pool = ThreadPoolBuilder::new().num_threads(options.threads).build()?;
    check_room(&out, &missing)?;
    for file in &missing {
        write(&view, file, &out, &pool, &progress)
            .map_err(|error| explain(error, &out, &missing))?;
    }
    let written = ByteSize(progress.position());
    let rate = rate(progress.position(), progress.elapsed());
    let kept = files.len() - missing.len();
    drop(progress);
    output::print(&format!(
        "exported `{}` to `{}`: {}; files written: {} ({written} at {rate}), kept: {kept}\n",
        source.display(),
        out.display(),
        plan.summary,
        missing.len()
    ))
}

/// The path without symlinks, of a directory that need not be there yet.
fn absolute(out: &Path) -> anyhow::Result<PathBuf> {
    let shown = || format!("cannot look at `{}`", out.display());
    let out = std::path::absolute(out).with_context(shown)?;
    let there = out.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let rest = out.strip_prefix(there).expect("an ancestor is a prefix");
    // Joined one by one, since joining nothing would add a slash.
    Ok(rest.iter().fold(there.canonicalize().with_context(shown)?, |path, name| path.join(name)))
}

/// Directory of what is about the mount and not of the checkpoint.
const STATUS_DIRECTORY: &str = ".mount-ckpt";

/// Every file of a view but those about the mount itself, directory after directory.
fn files(view: &View) -> anyhow::Result<Vec<ViewFile>> {
    let mut files = Vec::new();
    let mut directories = vec![(PathBuf::new(), Ino::ROOT)];
    while let Some((path, ino)) = directories.pop() {
        // The first two entries are the directory itself and the one above it.
        for n in 2.. {
            let Some(entry) = view.entry(ino, n)? else { break };
            if path.as_os_str().is_empty() && entry.name == STATUS_DIRECTORY {
                continue;
            }
            let path = path.join(&*entry.name);
            match entry.kind {
                Kind::Directory => directories.push((path, entry.ino)),
                Kind::File => {
                    let bytes = view.attr(entry.ino)?.size;
                    files.push(ViewFile { path, ino: entry.ino, bytes });
                }
            }
        }
    }
    Ok(files)
}

/// Fills `out` with the bytes of a file from `at` on.
fn read_file(view: &View, file: &ViewFile, mut at: u64, mut out: &mut [u8]) -> anyhow::Result<()> {
    while !out.is_empty() {
        let shown = || format!("`{}` of the view", file.path.display());
        let read = view.read(file.ino, at, out).with_context(shown)?;
        anyhow::ensure!(read > 0, "{}: expected {} more bytes, got none", shown(), out.len());
        out = &mut out[read..];
        at += u64::try_from(read).expect("a read is below 2^64 bytes");
    }
    Ok(())
}

/// Shards first, then what is small, the index at the very end.
fn in_writing_order(mut files: Vec<ViewFile>) -> Vec<ViewFile> {
    let rank = |file: &ViewFile| {
        let name = file.path.to_string_lossy();
        match () {
            () if name.ends_with(".safetensors") => 0,
            () if name.ends_with(".index.json") => 2,
            () => 1,
        }
    };
    files.sort_by(|a, b| (rank(a), &a.path).cmp(&(rank(b), &b.path)));
    files
}

/// What identifies the content of an export: the checkpoint, the plan and the files.
fn marker(
    source: &Path,
    plan: &serde_json::Value,
    files: &[ViewFile],
) -> anyhow::Result<serde_json::Value> {
    let newest = |path: &Path| -> io::Result<Vec<String>> {
        let mut seen = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            // Through symlinks: a hub snapshot is made of them.
            let meta = fs::metadata(entry.path())?;
            if meta.is_file() {
                let name = entry.file_name();
                seen.push(format!("{name:?} {} {:?}", meta.len(), meta.modified()?));
            }
        }
        seen.sort();
        Ok(seen)
    };
    let sources = newest(source).with_context(|| format!("cannot list `{}`", source.display()))?;
    let sizes: Vec<String> =
        files.iter().map(|file| format!("{:?} {}", file.path, file.bytes)).collect();
    let text = format!("{plan}\n{}\n{}", sources.join("\n"), sizes.join("\n"));
    Ok(serde_json::json!({
        "source": source.to_string_lossy(),
        "fingerprint": format!("{:016x}", fnv1a(text.as_bytes())),
    }))
}

/// FNV-1a, 64 bits: tells one export from another; nobody is out to fool it.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Makes the directory ours: it is absent or empty, or an export with the same marker is in it.
fn claim(out: &Path, marker: &serde_json::Value) -> anyhow::Result<()> {
    let shown = out.display();
    fs::create_dir_all(out).with_context(|| format!("cannot make `{shown}`"))?;
    let file = out.join(MARKER);
    match fs::read(&file) {
        Ok(text) => {
            let there: Option<serde_json::Value> = serde_json::from_slice(&text).ok();
            ensure!(
                there.as_ref() == Some(marker),
                "`{shown}` holds an export of another checkpoint or with other options: give \
                 another directory, or empty it"
            );
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut entries =
                out.read_dir().with_context(|| format!("cannot look at `{shown}`"))?;
            ensure!(
                entries.next().is_none(),
                "`{shown}` is not empty and holds no export: give an empty directory"
            );
            fs::write(&file, format!("{marker:#}\n"))
                .with_context(|| format!("cannot write `{}`", file.display()))
        }
        Err(error) => Err(error).with_context(|| format!("cannot read `{}`", file.display())),
    }
}

/// The files that are not complete yet. A name in place is complete: it was renamed to.
fn missing(out: &Path, files: &[ViewFile]) -> anyhow::Result<Vec<ViewFile>> {
    let mut missing = Vec::new();
    for file in files {
        let path = out.join(&file.path);
        match path.metadata() {
            Ok(meta) if meta.is_file() && meta.len() == file.bytes => {}
            Ok(meta) if !meta.is_file() => bail!("`{}` is in the way", path.display()),
            _ => missing.push(file.clone()),
        }
    }
    Ok(missing)
}

/// Refuses before the first byte what cannot fit at the end.
fn check_room(out: &Path, missing: &[ViewFile]) -> anyhow::Result<()> {
    let needed: u64 = missing.iter().map(|file| file.bytes).sum();
    let Some(free) = free(out) else { return Ok(()) };
    // What an interrupted export left is overwritten.
    let left: u64 = missing
        .iter()
        .filter_map(|file| Some(partial(&out.join(&file.path)).metadata().ok()?.len()))
        .sum();
    ensure!(needed <= free.saturating_add(left), no_room(out, needed, free));
    Ok(())
}

fn no_room(out: &Path, needed: u64, free: u64) -> String {
    format!(
        "no room in `{}`: {} needed, {} free; make room and start again, complete files are kept",
        out.display(),
        ByteSize(needed),
        ByteSize(free)
    )
}

/// Bytes that may still be written below `out`.
fn free(out: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(out).ok()?;
    stat.blocks_available().checked_mul(stat.fragment_size())
}

/// A full disk, in words that say what to do.
fn explain(error: anyhow::Error, out: &Path, missing: &[ViewFile]) -> anyhow::Error {
    let full = |cause: &(dyn std::error::Error + 'static)| {
        let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    };
    if !error.chain().any(full) {
        return error;
    }
    let done: HashSet<_> =
        missing.iter().filter(|file| out.join(&file.path).exists()).map(|f| &f.path).collect();
    let left = missing.iter().filter(|file| !done.contains(&file.path));
    anyhow::anyhow!(no_room(out, left.map(|file| file.bytes).sum(), free(out).unwrap_or(0)))
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().map(OsString::from).unwrap_or_default();
    name.push(".partial");
    path.with_file_name(name)
}

fn write(
    view: &View,
    file: &ViewFile,
    out: &Path,
    pool: &ThreadPool,
    progress: &ProgressBar,
) -> anyhow::Result<()> {
    let path = out.join(&file.path);
    let partial = partial(&path);
    let writing = || format!("cannot write `{}`", partial.display());
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(writing)?;
    }
    let target = File::create(&partial).with_context(writing)?;
    for_each_piece(pool, file.bytes, |at, piece| {
        read_file(view, file, at, piece)?;
        target.write_all_at(piece, at).with_context(writing)?;
        progress.inc(to_u64(piece.len()));
        Ok(())
    })?;
    // On disk before it has its name: a name means complete, also after a power failure.
    target.sync_all().with_context(writing)?;
    fs::rename(&partial, &path).with_context(writing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, bytes: u64) -> ViewFile {
        ViewFile { path: path.into(), ino: Ino(2), bytes }
    }

    #[test]
    fn the_index_comes_last() {
        let files = [
            "config.json",
            "model.safetensors.index.json",
            "ep-0000-of-0002/model.safetensors.index.json",
            "model-00002-of-00002.safetensors",
            "ep-0000-of-0002/model-00001-of-00001.safetensors",
            "model-00001-of-00002.safetensors",
        ];
        let ordered = in_writing_order(files.iter().map(|path| file(path, 1)).collect());
        let ordered: Vec<_> = ordered.iter().map(|file| file.path.to_str().unwrap()).collect();
        let want = [
            "ep-0000-of-0002/model-00001-of-00001.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "config.json",
            "ep-0000-of-0002/model.safetensors.index.json",
            "model.safetensors.index.json",
        ];
        assert_eq!(ordered, want);
    }

    #[test]
    fn complete_files_of_the_right_size_are_kept() {
        let out = tempfile::tempdir().unwrap();
        fs::write(out.path().join("whole"), "12345").unwrap();
        fs::write(out.path().join("short"), "1").unwrap();
        fs::write(out.path().join("left.partial"), "12345").unwrap();
        let files = [file("whole", 5), file("short", 5), file("left", 5)];
        let missing = missing(out.path(), &files).unwrap();
        let names: Vec<_> = missing.iter().map(|file| file.path.to_str().unwrap()).collect();
        assert_eq!(names, ["short", "left"]);
        fs::create_dir(out.path().join("directory")).unwrap();
        assert!(super::missing(out.path(), &[file("directory", 5)]).is_err());
    }

    #[test]
    fn a_directory_is_claimed_once() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("deep/out");
        let (mine, other) = (serde_json::json!({"a": 1}), serde_json::json!({"a": 2}));
        claim(&out, &mine).unwrap();
        claim(&out, &mine).unwrap();
        let error = claim(&out, &other).unwrap_err().to_string();
        assert!(error.contains("another checkpoint or with other options"), "{error}");
        let error = claim(root.path(), &mine).unwrap_err().to_string();
        assert!(error.contains("is not empty and holds no export"), "{error}");
    }

    #[test]
    fn what_cannot_fit_is_refused() {
        let out = tempfile::tempdir().unwrap();
        check_room(out.path(), &[file("a", 1)]).unwrap();
        let error = check_room(out.path(), &[file("a", u64::MAX / 2)]).unwrap_err().to_string();
        assert!(error.contains("no room in") && error.contains("needed"), "{error}");
        let full = anyhow::Error::new(io::Error::from(io::ErrorKind::StorageFull)).context("write");
        let error = explain(full, out.path(), &[file("a", 1)]).to_string();
        assert!(error.contains("no room in") && error.contains("complete files are kept"));
    }

    #[test]
    fn fnv_has_its_published_values() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
