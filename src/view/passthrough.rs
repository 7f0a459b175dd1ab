//! A file of the source that the view shows byte for byte, such as tokenizer.json.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::SystemTime;

use super::ViewError;

/// A file of the source, with its size and time when the view was built. It is opened once, when it
/// is first opened or read.
#[derive(Debug)]
pub(super) struct PassthroughFile {
    path: PathBuf,
    size: u64,
    mtime: SystemTime,
    file: OnceLock<File>,
}

impl PassthroughFile {
    pub(super) fn new(path: PathBuf, size: u64, mtime: SystemTime) -> PassthroughFile {
        PassthroughFile { path, size, mtime, file: OnceLock::new() }
    }

    /// Size in bytes when the view was built.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The open file.
    ///
    /// # Errors
    /// If it cannot be opened, or has another size or time than when the view was built: its new
    /// bytes would be cut to the old size.
    pub(super) fn file(&self) -> Result<&File, ViewError> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let file = File::open(&self.path).map_err(|e| self.failed(e))?;
        let now = file.metadata().map_err(|e| self.failed(e))?;
        if now.len() != self.size || now.modified().map_err(|e| self.failed(e))? != self.mtime {
            return Err(self.changed(now.len()));
        }
        Ok(self.file.get_or_init(|| file))
    }

    /// Reads bytes from offset `at` into `out` and returns how many. The file ends at its size when
    /// the view was built.
    ///
    /// # Errors
    /// As [`PassthroughFile::file`], and if the file is now shorter than that.
    pub(super) fn read(&self, at: u64, out: &mut [u8]) -> Result<usize, ViewError> {
        let rest = self.size.saturating_sub(at);
        let n = usize::try_from(rest).unwrap_or(usize::MAX).min(out.len());
        if n == 0 {
            return Ok(0);
        }
        let file = self.file()?;
        match file.read_exact_at(&mut out[..n], at) {
            Ok(()) => Ok(n),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                let got = file.metadata().map_or(0, |now| now.len());
                Err(self.changed(got))
            }
            Err(source) => Err(self.failed(source)),
        }
    }

    fn failed(&self, source: io::Error) -> ViewError {
        ViewError::Host { path: self.path.clone(), source }
    }

    fn changed(&self, got: u64) -> ViewError {
        ViewError::HostChanged { path: self.path.clone(), expected: self.size, got }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::Duration;

    use super::*;

    fn host(path: &Path) -> PassthroughFile {
        let now = fs::metadata(path).expect("there");
        PassthroughFile::new(path.to_owned(), now.len(), now.modified().expect("known"))
    }

    #[test]
    fn bytes_come_from_the_file_that_was_opened_first() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("tokenizer.json");
        fs::write(&path, b"0123456789").expect("written");
        let host = host(&path);
        let mut out = [0; 4];
        for (at, expected) in [(0, &b"0123"[..]), (8, b"89"), (10, b""), (u64::MAX >> 1, b"")] {
            let n = host.read(at, &mut out).expect("readable");
            assert_eq!(&out[..n], expected, "at {at}");
        }
        // A file that grows keeps its old size; one that is truncated is an error.
        fs::write(&path, b"0123456789ab").expect("written");
        assert_eq!(host.read(8, &mut out).expect("readable"), 2);
        fs::write(&path, b"01234").expect("written");
        assert_eq!(host.read(1, &mut out).expect("readable"), 4);
        let error = host.read(4, &mut out).expect_err("cut").to_string();
        assert!(error.contains("expected 10 bytes, got 5 bytes"), "{error}");
        // An open file stays readable after it was removed.
        fs::remove_file(&path).expect("removed");
        assert_eq!(host.read(1, &mut out).expect("readable"), 4);
    }

    #[test]
    fn a_file_that_changed_before_its_first_read_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("tokenizer.json");
        fs::write(&path, b"0123456789").expect("written");
        let longer = host(&path);
        fs::write(&path, b"0123456789a").expect("written");
        let error = longer.read(0, &mut [0; 4]).expect_err("another size").to_string();
        assert!(error.ends_with("expected 10 bytes, got 11 bytes, or a newer file"), "{error}");

        let newer = host(&path);
        let file = File::options().write(true).open(&path).expect("there");
        file.set_modified(newer.mtime + Duration::from_secs(1)).expect("touched");
        let error = newer.read(0, &mut [0; 4]).expect_err("another time");
        assert!(matches!(error, ViewError::HostChanged { .. }), "{error}");

        let gone = host(&path);
        fs::remove_file(&path).expect("removed");
        let error = gone.read(0, &mut [0; 4]).expect_err("no file");
        assert!(matches!(error, ViewError::Host { .. }), "{error}");
    }
}
