//! Reads files as loaders do: copies of memory-mapped files, and large `pread`s from one or more
//! threads.

use std::fs::{self, File};
use std::hint::black_box;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result};
use memmap2::{Mmap, MmapMut};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// Bytes of one copy or read.
const PIECE: usize = 8 << 20;

/// The shards of a directory, sorted by name.
pub fn shards(directory: &Path) -> Result<Vec<PathBuf>> {
    let shown = || format!("cannot list `{}`", directory.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).with_context(shown)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Drops the pages of files from the page cache.
pub fn forget(paths: &[PathBuf]) -> Result<()> {
    for path in paths {
        let file = File::open(path)?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    }
    Ok(())
}

/// Brings the pages of files into the page cache.
pub fn warm(paths: &[PathBuf]) -> Result<()> {
    pread(paths, 1).map(drop)
}

/// Maps each file and copies it, in pieces, to the same 8 MiB of memory. Returns the number of
/// bytes.
pub fn mapped(paths: &[PathBuf]) -> Result<u64> {
    let mut buffer = touched(PIECE)?;
    let mut bytes = 0;
    for path in paths {
        let file = File::open(path)?;
        // SAFETY: the files are the bench's own, and nothing changes them while it runs.
        let map = unsafe { Mmap::map(&file)? };
        for piece in map.chunks(PIECE) {
            black_box(&mut buffer)[..piece.len()].copy_from_slice(piece);
        }
        bytes += u64::try_from(map.len())?;
    }
    Ok(bytes)
}

/// Reads each file in pieces of 8 MiB; thread `i` reads every `threads`-th piece from piece `i` on.
/// Returns the number of bytes.
pub fn pread(paths: &[PathBuf], threads: usize) -> Result<u64> {
    let mut bytes = 0;
    for path in paths {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        thread::scope(|scope| -> Result<()> {
            let readers: Vec<_> = (0..threads)
                .map(|reader| {
                    let file = &file;
                    scope.spawn(move || -> Result<()> {
                        let mut buffer = touched(PIECE)?;
                        for at in pieces(size).skip(reader).step_by(threads) {
                            let n = usize::try_from((size - at).min(PIECE as u64))?;
                            file.read_exact_at(&mut buffer[..n], at)?;
                        }
                        Ok(())
                    })
                })
                .collect();
            readers.into_iter().try_for_each(|r| r.join().expect("readers do not panic"))
        })?;
        bytes += size;
    }
    Ok(bytes)
}

fn pieces(size: u64) -> impl Iterator<Item = u64> {
    (0..size).step_by(PIECE)
}

/// Page-aligned memory, as readers that bypass the page cache need it, with all pages allocated.
fn touched(bytes: usize) -> Result<MmapMut> {
    let mut memory = MmapMut::map_anon(bytes)?;
    memory.fill(1);
    Ok(memory)
}
