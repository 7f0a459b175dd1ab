//! `export`: writes the files of a view to a directory, without FUSE.
//!
//! Each file is written as `NAME.partial` and renamed when it is complete, the index last, so that a
//! loader never finds a partial checkpoint. An interrupted export continues when it is started again:
//! complete files are kept. The file [`MARKER`] records which checkpoint, plan and files the directory
//! is for, and an export of anything else into it is refused.

use super::args::ExportArgs;
use super::open;
use super::output;
use super::pieces::for_each_piece;
use super::progress::{bar, rate};
use super::request::ViewRequest;
use crate::read::{Engine, EngineOptions};
use crate::tensor::{ByteSize, to_u64};
use crate::view::{Ino, Kind, STATUS_DIRECTORY, View};
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

/// Name of the file that identifies the export. Its leading dot keeps it out of loaders' globs.
const MARKER: &str = ".mount-ckpt-export.json";

/// A file of the view that is to be written.
#[derive(Clone, Debug)]
struct ViewFile {
    /// Path below the root of the view.
    path: PathBuf,
    ino: Ino,
    bytes: u64,
}

/// Writes a view to a directory and prints what was written.
///
/// # Errors
/// The view is not possible; the directory cannot be created, is inside the checkpoint, has other
/// contents or too little free space; or a file cannot be read or written.
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
    prepare_directory(&out, &marker)?;
    let missing = missing(&out, &files)?;
    let progress = bar("export", missing.iter().map(|file| file.bytes).sum());
    let pool = ThreadPoolBuilder::new().num_threads(options.threads).build()?;
    check_free_space(&out, &missing)?;
    for file in &missing {
        write(&view, file, &out, &pool, &progress)
            .map_err(|error| explain_full_disk(error, &out, &missing))?;
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

/// The absolute path, without symlinks, of a directory that need not exist yet.
fn absolute(out: &Path) -> anyhow::Result<PathBuf> {
    let shown = || format!("cannot open `{}`", out.display());
    let out = std::path::absolute(out).with_context(shown)?;
    let there = out.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let rest = out.strip_prefix(there).expect("an ancestor is a prefix");
    // Joined name by name, since joining an empty path adds a slash.
    Ok(rest.iter().fold(there.canonicalize().with_context(shown)?, |path, name| path.join(name)))
}

/// All files of a view except the status files.
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

/// Fills `out` with the bytes of a file from offset `at` on.
fn read_file(view: &View, file: &ViewFile, mut at: u64, mut out: &mut [u8]) -> anyhow::Result<()> {
    while !out.is_empty() {
        let shown = || format!("`{}` of the view", file.path.display());
        let read = view.read(file.ino, at, out).with_context(shown)?;
        ensure!(read > 0, "{}: expected {} more bytes, got none", shown(), out.len());
        out = &mut out[read..];
        at += to_u64(read);
    }
    Ok(())
}

/// Sorts files into the order in which they are written: shards, other files, indexes.
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

/// The content of [`MARKER`]: the checkpoint's directory and a fingerprint of the source files, the plan
/// and the files of the view.
fn marker(
    source: &Path,
    plan: &serde_json::Value,
    files: &[ViewFile],
) -> anyhow::Result<serde_json::Value> {
    let listing = |path: &Path| -> io::Result<Vec<String>> {
        let mut seen = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            // Follows symlinks: a snapshot of the hub consists of them.
            let meta = fs::metadata(entry.path())?;
            if meta.is_file() {
                let name = entry.file_name();
                seen.push(format!("{name:?} {} {:?}", meta.len(), meta.modified()?));
            }
        }
        seen.sort();
        Ok(seen)
    };
    let sources = listing(source).with_context(|| format!("cannot list `{}`", source.display()))?;
    let sizes: Vec<String> =
        files.iter().map(|file| format!("{:?} {}", file.path, file.bytes)).collect();
    let text = format!("{plan}\n{}\n{}", sources.join("\n"), sizes.join("\n"));
    Ok(serde_json::json!({
        "source": source.to_string_lossy(),
        "fingerprint": format!("{:016x}", fnv1a(text.as_bytes())),
    }))
}

/// The 64-bit FNV-1a hash. It tells exports apart; it need not resist an attacker.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Creates the directory and its marker, or accepts one that has the same marker.
///
/// # Errors
/// The directory has other contents or another marker, or cannot be read or written.
fn prepare_directory(out: &Path, marker: &serde_json::Value) -> anyhow::Result<()> {
    let shown = out.display();
    fs::create_dir_all(out).with_context(|| format!("cannot create `{shown}`"))?;
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
            let mut entries = out.read_dir().with_context(|| format!("cannot open `{shown}`"))?;
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

/// The files that are still to be written. One that has its final name and size is complete, since files
/// are renamed only when they are.
fn missing(out: &Path, files: &[ViewFile]) -> anyhow::Result<Vec<ViewFile>> {
    let mut missing = Vec::new();
    for file in files {
        let path = out.join(&file.path);
        match path.metadata() {
            Ok(meta) if meta.is_file() && meta.len() == file.bytes => {}
            Ok(meta) if !meta.is_file() => {
                bail!("`{}` is not a file: remove it, or give another directory", path.display())
            }
            _ => missing.push(file.clone()),
        }
    }
    Ok(missing)
}

/// Refuses an export that does not fit on the disk before anything is written.
fn check_free_space(out: &Path, missing: &[ViewFile]) -> anyhow::Result<()> {
    let needed: u64 = missing.iter().map(|file| file.bytes).sum();
    let Some(free) = free(out) else { return Ok(()) };
    // Partial files of an interrupted export are overwritten, so their space counts as free.
    let left: u64 = missing
        .iter()
        .filter_map(|file| Some(partial(&out.join(&file.path)).metadata().ok()?.len()))
        .sum();
    ensure!(needed <= free.saturating_add(left), no_room(out, needed, free));
    Ok(())
}

fn no_room(out: &Path, needed: u64, free: u64) -> String {
    format!(
        "no room in `{}`: {} needed, {} free; free some space and start again: complete files are kept",
        out.display(),
        ByteSize(needed),
        ByteSize(free)
    )
}

/// Free bytes of the file system of `out`; `None` if the system does not tell.
fn free(out: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(out).ok()?;
    stat.blocks_available().checked_mul(stat.fragment_size())
}

/// Replaces the error of a full disk by one that says how much space is missing.
fn explain_full_disk(error: anyhow::Error, out: &Path, missing: &[ViewFile]) -> anyhow::Error {
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
    // Synced before it is renamed, so that the final name means complete also after a power failure.
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
    fn the_index_is_written_last() {
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
    fn a_directory_of_another_export_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("deep/out");
        let (mine, other) = (serde_json::json!({"a": 1}), serde_json::json!({"a": 2}));
        prepare_directory(&out, &mine).unwrap();
        prepare_directory(&out, &mine).unwrap();
        let error = prepare_directory(&out, &other).unwrap_err().to_string();
        assert!(error.contains("another checkpoint or with other options"), "{error}");
        let error = prepare_directory(root.path(), &mine).unwrap_err().to_string();
        assert!(error.contains("is not empty and holds no export"), "{error}");
    }

    #[test]
    fn an_export_larger_than_the_free_space_is_refused() {
        let out = tempfile::tempdir().unwrap();
        check_free_space(out.path(), &[file("a", 1)]).unwrap();
        let error =
            check_free_space(out.path(), &[file("a", u64::MAX / 2)]).unwrap_err().to_string();
        assert!(error.contains("no room in") && error.contains("needed"), "{error}");
        let full = anyhow::Error::new(io::Error::from(io::ErrorKind::StorageFull)).context("write");
        let error = explain_full_disk(full, out.path(), &[file("a", 1)]).to_string();
        assert!(error.contains("no room in") && error.contains("complete files are kept"));
    }

    #[test]
    fn fnv_has_its_published_values() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
