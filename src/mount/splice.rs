//! Replies that the kernel copies out of the page cache of another file, once.
//!
//! fuser sends memory, so that bytes of a file would be copied twice: into a buffer of this process and
//! out of it. Spliced into a pipe they stay where they are, and the reply to the kernel is the pipe's
//! contents. A mapped copy of bytes that are shown as they are stored is a third faster so, one in requests
//! of 128 KiB nearly half.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::{SysconfVar, pipe2, sysconf, write};

/// Bytes from which on a reply is spliced.
const WORTH: usize = 64 << 10;

/// Bytes of `struct fuse_out_header`: length, error, number of the request.
const HEADER: usize = 16;

/// The descriptor through which a mount answers, once it is mounted.
#[derive(Clone, Debug, Default)]
pub struct Device(Arc<OnceLock<OwnedFd>>);

/// A pipe with nothing in it.
struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
    /// Pages, or pieces of them, that it holds.
    pages: usize,
    page: usize,
}

thread_local! {
    /// The pipe of a request thread, unless what is in it is not known.
    static PIPE: RefCell<Option<Pipe>> = const { RefCell::new(None) };
}

impl Device {
    /// Notes the descriptor.
    ///
    /// # Errors
    /// Where the process has no more descriptors.
    pub(super) fn set(&self, device: BorrowedFd<'_>) -> io::Result<()> {
        let own = device.try_clone_to_owned()?;
        self.0.set(own).map_err(|_| io::Error::other("it is mounted already"))
    }

    /// Answers request `unique` with `bytes` bytes of a file at `offset`, and tells whether it did. Where
    /// not, nothing was sent: the file is shorter or cannot be spliced, or the pipe is too small.
    pub(super) fn send(&self, unique: u64, file: &File, offset: u64, bytes: usize) -> bool {
        let Some(device) = self.0.get().filter(|_| bytes >= WORTH) else { return false };
        PIPE.with_borrow_mut(|kept| {
            let Some(mut pipe) = kept.take().or_else(|| Pipe::new().ok()) else { return false };
            if !pipe.holds(offset, bytes) {
                *kept = Some(pipe);
                return false;
            }
            let sent = pipe.fill(unique, file, offset, bytes).is_some_and(|whole| {
                let flags = SpliceFFlags::empty();
                splice(&pipe.out, None, device, None, whole, flags) == Ok(whole)
            });
            // Else it holds the start of a reply.
            *kept = sent.then_some(pipe);
            sent
        })
    }
}

/// Whether replies of `bytes` bytes can be spliced: the reply's header takes a page of the pipe, and
/// more than `fs.pipe-max-size`, which is 1 MiB, takes CAP_SYS_RESOURCE.
pub(super) fn can_send(bytes: usize) -> bool {
    Pipe::new().is_ok_and(|mut pipe| pipe.holds(0, bytes))
}

impl Pipe {
    fn new() -> nix::Result<Pipe> {
        let (out, into) = pipe2(OFlag::O_CLOEXEC)?;
        let page = sysconf(SysconfVar::PAGE_SIZE)?;
        let page = page.and_then(|n| usize::try_from(n).ok()).ok_or(Errno::ENOSYS)?;
        Ok(Pipe { out, into, pages: 0, page })
    }

    /// Whether a header and some bytes of a file fit, after the system was asked for more room where
    /// they did not.
    fn holds(&mut self, offset: u64, bytes: usize) -> bool {
        let page = u64::try_from(self.page).expect("a page is small");
        let into = usize::try_from(offset % page).expect("below a page");
        let pages = 1 + (into + bytes).div_ceil(self.page);
        if pages > self.pages
            && let Ok(size) = i32::try_from(pages * self.page)
            && let Ok(size) = fcntl(&self.into, FcntlArg::F_SETPIPE_SZ(size))
        {
            self.pages = usize::try_from(size).unwrap_or_default() / self.page;
        }
        pages <= self.pages
    }

    /// Puts a reply into the pipe, which holds it; gives its bytes, or `None` where the file has fewer.
    fn fill(&self, unique: u64, file: &File, offset: u64, bytes: usize) -> Option<usize> {
        let whole = HEADER + bytes;
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&u32::try_from(whole).ok()?.to_ne_bytes());
        header[8..].copy_from_slice(&unique.to_ne_bytes());
        if write(&self.into, &header) != Ok(HEADER) {
            return None;
        }
        let mut at = i64::try_from(offset).ok()?;
        let mut left = bytes;
        while left > 0 {
            let flags = SpliceFFlags::empty();
            let n = splice(file, Some(&mut at), &self.into, None, left, flags).ok()?;
            let whole_pages = usize::try_from(at).ok()?.is_multiple_of(self.page);
            if n == 0 || (n < left && !whole_pages) {
                // The end of the file; or pieces that are smaller than pages, and may not fit.
                return None;
            }
            left -= n;
        }
        Some(whole)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(bytes).expect("written");
        file
    }

    #[test]
    fn a_reply_is_a_header_and_the_bytes_of_the_file() {
        let bytes: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        let (file, mut pipe) = (file(&bytes), Pipe::new().expect("a pipe"));
        for (offset, n) in [(0, 200_000), (4096, 65_536), (4095, 70_000), (250_000, 50_000)] {
            assert!(pipe.holds(offset, n));
            assert_eq!(pipe.fill(0x0102_0304_0506_0708, &file, offset, n), Some(HEADER + n));
            let mut got = vec![0; HEADER + n];
            File::from(pipe.out.try_clone().expect("a descriptor"))
                .read_exact(&mut got)
                .expect("it is in the pipe");
            let length = u32::try_from(HEADER + n).expect("small").to_ne_bytes();
            assert_eq!(got[..4], length);
            assert_eq!(got[4..8], [0; 4], "no error");
            assert_eq!(got[8..16], 0x0102_0304_0506_0708u64.to_ne_bytes());
            let start = usize::try_from(offset).expect("small");
            assert!(got[16..] == bytes[start..start + n], "at {offset}");
        }
    }

    #[test]
    fn what_was_not_sent_leaves_nothing_behind() {
        let sent = tempfile::NamedTempFile::new().expect("a file");
        let device = Device::default();
        let whole = file(&[7; 100_000]);
        assert!(!device.send(1, &whole, 0, 100_000), "it is not mounted");
        device.set(sent.as_fd()).expect("a descriptor");
        for (offset, n, expected) in [
            (0, 100_000, true),
            (1, 100_000, false),
            (0, WORTH - 1, false),
            (100_000 - 65_536, 65_536, true),
            (0, 1 << 40, false),
        ] {
            assert_eq!(device.send(1, &whole, offset, n), expected, "{n} at {offset}");
        }
        let sent = sent.as_file().metadata().expect("there").len();
        assert_eq!(sent, 2 * 16 + 100_000 + 65_536);
    }

    #[test]
    fn what_does_not_fit_or_is_not_there_is_not_sent() {
        let (bytes, whole) = (100_000, vec![7; 100_000]);
        for (at, n) in [(0, bytes + 1), (1, bytes), (100_000, 1)] {
            let mut pipe = Pipe::new().expect("a pipe");
            assert!(pipe.holds(at, n));
            assert_eq!(pipe.fill(1, &file(&whole), at, n), None, "{n} at {at}");
        }
        // More than a length can say, which no system grants.
        assert!(can_send(bytes) && !can_send(1 << 40));
    }
}
