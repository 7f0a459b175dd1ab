//! One safetensors file: opened once, checked, read by `pread`.
//!
//! The descriptor stays open as long as the checkpoint does, so that a file that is replaced by
//! rename goes on giving the bytes that were checked.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::checkpoint::{ShardId, SourceTensor};
use super::error::ShardError;
use super::header::{self, HeaderError, LENGTH_BYTES, MAX_HEADER_BYTES};

/// How every git-LFS pointer starts (git-lfs `docs/spec.md`).
pub(super) const LFS_SIGNATURE: &[u8] = b"version https://git-lfs";

/// Bytes of one `WILLNEED` request.
///
/// Linux cuts a request to the larger of the device's read-ahead and its largest transfer
/// (`force_page_cache_ra`), silently; 128 KiB is the smallest read-ahead that it comes with.
const ADVICE_BYTES: u64 = 128 << 10;

/// A safetensors file whose header has been checked.
#[derive(Debug)]
pub(crate) struct Shard {
    name: Box<str>,
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Shard {
    /// Opens the shard `name` of the checkpoint directory `dir` and checks its header; gives its
    /// tensors, sorted by name.
    pub(super) fn open(
        dir: &Path,
        name: &str,
        id: ShardId,
    ) -> Result<(Shard, Vec<SourceTensor>), ShardError> {
        let (path, file) = open_regular(&dir.join(name))?;
        let bytes = file.metadata()?.len();
        let data_start = LENGTH_BYTES.saturating_add(header_bytes(&file, bytes)?);
        let truncated =
            |expected, at_least| ShardError::Truncated { expected, at_least, actual: bytes };
        if data_start > bytes {
            return Err(truncated(data_start, true));
        }
        let length = usize::try_from(data_start - LENGTH_BYTES)
            .expect("a header of at most 100,000,000 bytes fits the memory");
        let mut text = vec![0; length];
        file.read_exact_at(&mut text, LENGTH_BYTES)?;
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

    /// The file itself, links resolved.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Tells the kernel that `bytes` bytes at `offset` are wanted soon. It may not listen.
    pub(super) fn will_need(&self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes).min(self.bytes);
        let mut at = offset;
        while at < end {
            let piece = ADVICE_BYTES.min(end - at);
            let (Ok(from), Ok(length)) = (i64::try_from(at), i64::try_from(piece)) else { return };
            let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
            if posix_fadvise(&self.file, from, length, advice).is_err() {
                return;
            }
            at += piece;
        }
    }
}

/// Opens a regular file, links followed; gives its real path too.
fn open_regular(path: &Path) -> Result<(PathBuf, File), ShardError> {
    let real = match fs::canonicalize(path) {
        Ok(real) => real,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(absent(path)),
        Err(e) => return Err(e.into()),
    };
    // Asked before the file is opened: opening a pipe would wait for its writer.
    if !fs::metadata(&real)?.is_file() {
        return Err(ShardError::NotAFile);
    }
    let file = File::open(&real)?;
    Ok((real, file))
}

fn absent(path: &Path) -> ShardError {
    match link_target(path) {
        Some(target) => ShardError::Dangling { partial: is_partial(&target), target },
        None => ShardError::Missing,
    }
}

/// Where the symlink at `path` points; `None` where there is no symlink.
pub(super) fn link_target(path: &Path) -> Option<PathBuf> {
    let target = fs::read_link(path).ok()?;
    Some(path.parent().map_or_else(|| target.clone(), |dir| dir.join(&target)))
}

/// Whether an unfinished hub download of the file at `path` is there.
pub(super) fn is_partial(path: &Path) -> bool {
    let mut name = path.as_os_str().to_owned();
    name.push(".incomplete");
    Path::new(&name).exists()
}

/// Length of the header by the first eight bytes of the file.
fn header_bytes(file: &File, bytes: u64) -> Result<u64, ShardError> {
    // Long enough for a git-LFS pointer, which has about 130 bytes.
    let mut start = Vec::with_capacity(512);
    io::Read::read_to_end(&mut io::Read::take(file, 512), &mut start)?;
    if start.starts_with(LFS_SIGNATURE) {
        return Err(ShardError::LfsPointer { expected: lfs_size(&start), actual: bytes });
    }
    let Some(length) = start.first_chunk() else {
        return Err(ShardError::Truncated {
            expected: LENGTH_BYTES,
            at_least: true,
            actual: bytes,
        });
    };
    match u64::from_le_bytes(*length) {
        length if length > MAX_HEADER_BYTES => Err(HeaderError::TooLarge { bytes: length }.into()),
        length => Ok(length),
    }
}

/// The `size` line of a git-LFS pointer.
fn lfs_size(pointer: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(pointer).ok()?;
    text.lines().find_map(|line| line.strip_prefix("size "))?.trim().parse().ok()
}
