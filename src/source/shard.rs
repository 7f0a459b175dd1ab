//! One safetensors file: opened once, validated, and then read with `pread`.
//!
//! The file stays open as long as the checkpoint. If another file is renamed over it, reads still
//! return the bytes of the file that was validated.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::checkpoint::{ShardId, SourceTensor};
use super::error::ShardError;
use super::header::{self, HeaderError, LENGTH_PREFIX_BYTES, MAX_HEADER_BYTES};

/// The first bytes of every git-LFS pointer (git-lfs `docs/spec.md`).
pub(super) const LFS_SIGNATURE: &[u8] = b"version https://git-lfs";

/// Size in bytes of one `POSIX_FADV_WILLNEED` request.
///
/// Linux silently cuts a request to the larger of the device's read-ahead and its largest transfer
/// (`force_page_cache_ra`). 128 KiB is its default read-ahead.
const ADVICE_BYTES: u64 = 128 << 10;

/// An open safetensors file whose header was validated.
#[derive(Debug)]
pub(crate) struct Shard {
    name: Box<str>,
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Shard {
    /// Opens the shard `name` of the checkpoint directory `dir` and validates its header. Returns
    /// it with its tensors, sorted by name.
    pub(super) fn open(
        dir: &Path,
        name: &str,
        id: ShardId,
    ) -> Result<(Shard, Vec<SourceTensor>), ShardError> {
        let (path, file) = open_regular(&dir.join(name))?;
        let bytes = file.metadata()?.len();
        let data_start = LENGTH_PREFIX_BYTES.saturating_add(header_bytes(&file, bytes)?);
        let truncated =
            |expected, at_least| ShardError::Truncated { expected, at_least, actual: bytes };
        if data_start > bytes {
            return Err(truncated(data_start, true));
        }
        let length = usize::try_from(data_start - LENGTH_PREFIX_BYTES)
            .expect("a header of at most 100,000,000 bytes fits the memory");
        let mut text = vec![0; length];
        file.read_exact_at(&mut text, LENGTH_PREFIX_BYTES)?;
        let (tensors, data_bytes) = header::parse(&text, data_start, id)?;
        let expected = data_start.saturating_add(data_bytes);
        if bytes < expected {
            return Err(truncated(expected, false));
        }
        if bytes > expected {
            return Err(ShardError::Trailing { expected, actual: bytes });
        }
        Ok((Shard { name: name.into(), path, file, bytes }, tensors))
    }

    /// File name in the checkpoint directory.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Path of the file itself, symlinks resolved.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Asks the kernel to read bytes `offset..offset + bytes` into the page cache. Errors are
    /// ignored.
    pub(super) fn will_need(&self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes).min(self.bytes);
        let mut at = offset;
        while at < end {
            let bytes = ADVICE_BYTES.min(end - at);
            let (Ok(from), Ok(length)) = (i64::try_from(at), i64::try_from(bytes)) else { return };
            let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
            if posix_fadvise(&self.file, from, length, advice).is_err() {
                return;
            }
            at += bytes;
        }
    }
}

/// Opens a regular file, following symlinks. Returns its real path and the file.
fn open_regular(path: &Path) -> Result<(PathBuf, File), ShardError> {
    let real = match fs::canonicalize(path) {
        Ok(real) => real,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(absent(path)),
        Err(e) => return Err(e.into()),
    };
    // Checked before opening: opening a named pipe would block until it has a writer.
    if !fs::metadata(&real)?.is_file() {
        return Err(ShardError::NotAFile);
    }
    let file = File::open(&real)?;
    Ok((real, file))
}

/// The error for a path that does not exist.
fn absent(path: &Path) -> ShardError {
    match link_target(path) {
        Some(target) => ShardError::Dangling { partial: is_partial(&target), target },
        None => ShardError::Missing,
    }
}

/// Target of the symlink at `path`; `None` if there is no symlink.
pub(super) fn link_target(path: &Path) -> Option<PathBuf> {
    let target = fs::read_link(path).ok()?;
    Some(path.parent().map_or_else(|| target.clone(), |dir| dir.join(&target)))
}

/// Whether there is an unfinished hub download of the file at `path`.
pub(super) fn is_partial(path: &Path) -> bool {
    let mut name = path.as_os_str().to_owned();
    name.push(".incomplete");
    Path::new(&name).exists()
}

/// Length of the header, which the first eight bytes of the file state.
fn header_bytes(file: &File, bytes: u64) -> Result<u64, ShardError> {
    // Long enough for a git-LFS pointer, which has about 130 bytes.
    let mut start = Vec::with_capacity(512);
    io::Read::read_to_end(&mut io::Read::take(file, 512), &mut start)?;
    if start.starts_with(LFS_SIGNATURE) {
        return Err(ShardError::LfsPointer { expected: lfs_size(&start), actual: bytes });
    }
    let Some(length) = start.first_chunk() else {
        return Err(ShardError::Truncated {
            expected: LENGTH_PREFIX_BYTES,
            at_least: true,
            actual: bytes,
        });
    };
    match u64::from_le_bytes(*length) {
        length if length > MAX_HEADER_BYTES => Err(HeaderError::TooLarge { bytes: length }.into()),
        length => Ok(length),
    }
}

/// The value of the `size` line of a git-LFS pointer.
fn lfs_size(pointer: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(pointer).ok()?;
    text.lines().find_map(|line| line.strip_prefix("size "))?.trim().parse().ok()
}
