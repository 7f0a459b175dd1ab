//! The FUSE callbacks: answers the kernel's requests from a [`View`] and maps errors to errno.
//!
//! A view is immutable, so the kernel may cache every answer: names (absent ones too) and
//! attributes for an hour, pages from one open to the next. Every request that would write fails
//! with EROFS. The exception are the status files of `.mount-ckpt`: each open renders a text of its
//! own, and reads of it bypass the page cache because its size is not known in advance.
//!
//! Nothing in this file knows what a tensor is; that is the view's part.

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::HashMap;
use std::error::Error;
use std::ffi::OsStr;
use std::fmt::Display;
use std::fs::File;
use std::io;
use std::mem;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BackingId, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};

use crate::read::Buffer;
use crate::view::{Attr, Content, Ino, Kind, View, ViewError};

use super::Mountable;
use super::splice::{self, Device};

/// How long the kernel may cache names, absent names and attributes. They never change; with a TTL of
/// 0 a `stat` takes 12 us instead of 0.8.
const TTL: Duration = Duration::from_secs(3600);

/// `st_blksize` in bytes: the read size of `cat`, `cp` and Python's buffered files. With direct I/O,
/// reads of 4 KiB are 30 times slower.
const BLOCK_SIZE_BYTES: u32 = 1 << 20;

/// Most requests that the kernel may have in flight for read-ahead.
const MAX_BACKGROUND: u16 = 64;

/// Number of read-ahead requests in flight from which on the kernel holds back further ones.
const CONGESTION_THRESHOLD: u16 = 48;

/// Largest read request of the kernel by default, in bytes.
const DEFAULT_REQUEST_BYTES: usize = 1 << 20;

/// Largest read request for a mostly verbatim view where this process cannot splice replies of
/// [`DEFAULT_REQUEST_BYTES`] (see [`splice::can_splice`]). Replies of this size can be spliced, and
/// such a view is then read at 4.6 GB/s instead of 3.5. A view that is mostly decoded keeps the
/// default, because smaller requests slow it down from 2.9 to 2.5 GB/s.
const SPLICEABLE_REQUEST_BYTES: u32 = 512 << 10;

/// Inode numbers are never reused for another file.
const GENERATION: Generation = Generation(0);

/// The handle of every open file that has no state of its own: all but the status files.
const NO_HANDLE: FileHandle = FileHandle(0);

thread_local! {
    /// The buffer that a request thread reads into. It grows to the largest read of the thread and
    /// is reused, so that a read allocates nothing.
    static BUFFER: RefCell<Buffer> = RefCell::default();
}

/// Answers the kernel's requests from a [`View`].
pub struct Filesystem {
    view: Arc<View>,
    direct_io: bool,
    passthrough: bool,
    device: Device,
    /// For each passed-through file that was opened: the id under which the kernel reads the source
    /// file itself, or `None` if it does not. The decision holds for the life of the mount, since the
    /// kernel refuses an inode that is open in both ways.
    backing: Mutex<HashMap<Ino, Option<BackingId>>>,
    /// The text of each status file that is open, rendered when it was opened.
    live: Mutex<HashMap<FileHandle, Arc<[u8]>>>,
    next_handle: AtomicU64,
}

impl Filesystem {
    /// A file system that shows `view`. With `direct_io`, reads of shards bypass the page cache.
    pub fn new(view: Arc<View>, direct_io: bool) -> Filesystem {
        Filesystem {
            view,
            direct_io,
            passthrough: false,
            device: Device::default(),
            backing: Mutex::default(),
            live: Mutex::default(),
            next_handle: AtomicU64::new(NO_HANDLE.0 + 1),
        }
    }

    /// Opens a file that is passed through from the source. If the kernel and our privileges allow
    /// it, the kernel reads the source file itself (FUSE passthrough); otherwise the file is served
    /// like any other.
    fn open_host(&self, ino: Ino, file: &File, reply: ReplyOpen) {
        let mut backing = lock(&self.backing);
        let id = backing.entry(ino).or_insert_with(|| {
            let id = self.passthrough.then(|| reply.open_backing(file));
            id.and_then(|id| {
                id.inspect_err(|e| {
                    tracing::debug!("`{}` is not passed through: {e}", self.view.path(ino))
                })
                .ok()
            })
        });
        match id {
            Some(id) => reply.opened_passthrough(NO_HANDLE, FopenFlags::FOPEN_NOFLUSH, id),
            None => reply.opened(NO_HANDLE, cached()),
        }
    }

    fn open_live(&self, ino: Ino, reply: ReplyOpen) {
        match guarded(|| self.view.snapshot(ino)) {
            Ok(text) => {
                let handle = FileHandle(self.next_handle.fetch_add(1, Ordering::Relaxed));
                lock(&self.live).insert(handle, text.into());
                reply.opened(handle, direct());
            }
            Err(errno) => reply.error(errno),
        }
    }
}

/// The errno for an error. Errors that are not the caller's fault (EIO) are logged with their causes.
fn log_and_errno(error: &ViewError) -> Errno {
    let errno = errno(error);
    if errno == Errno::EIO {
        let mut line = error.to_string();
        let mut cause = error.source();
        while let Some(e) = cause {
            let text = e.to_string();
            // Some messages already end with the message of their cause.
            if !line.ends_with(&text) {
                line = format!("{line}: {text}");
            }
            cause = e.source();
        }
        tracing::error!("{line}");
    }
    errno
}

/// Runs code of the view and turns its error into an errno. A panic in there is a bug, but it must
/// not end the request thread: a mount without threads hangs its readers. It becomes EIO.
fn guarded<T>(answer: impl FnOnce() -> Result<T, ViewError>) -> Result<T, Errno> {
    // Unwind safe: the state that the view shares between threads tolerates a panicking thread.
    match panic::catch_unwind(AssertUnwindSafe(answer)) {
        Ok(result) => result.map_err(|e| log_and_errno(&e)),
        Err(_) => {
            tracing::error!("a request failed: the code that answers it panicked");
            Err(Errno::EIO)
        }
    }
}

/// The error for a setting that fuser rejects; fuser gives the nearest value that it would accept.
fn rejected_setting(nearest: impl Display) -> io::Error {
    io::Error::other(format!("the nearest setting that FUSE accepts is {nearest}"))
}

fn errno(error: &ViewError) -> Errno {
    match error {
        ViewError::NotFound => Errno::ENOENT,
        ViewError::NotADirectory => Errno::ENOTDIR,
        ViewError::IsADirectory => Errno::EISDIR,
        ViewError::Read { .. } | ViewError::Host { .. } | ViewError::HostChanged { .. } => {
            Errno::EIO
        }
        ViewError::DirectoryName { .. } | ViewError::TooLarge { .. } | ViewError::Header { .. } => {
            Errno::EINVAL
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock is fine: each use of these maps is a single call, so none is left half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Flags for files that the page cache holds. `FOPEN_KEEP_CACHE` keeps the pages from one open to the
/// next; without it, every open drops them and reads them again.
fn cached() -> FopenFlags {
    FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH
}

/// Flags for files whose reads bypass the page cache.
fn direct() -> FopenFlags {
    FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
    }
}

fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.size,
        blocks: attr.size.div_ceil(512),
        atime: attr.mtime,
        mtime: attr.mtime,
        ctime: attr.mtime,
        crtime: attr.mtime,
        kind: file_type(attr.kind),
        perm: attr.mode,
        nlink: attr.links,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        blksize: BLOCK_SIZE_BYTES,
        flags: 0,
    }
}

/// Defines callbacks of requests that write. All of them answer EROFS.
macro_rules! read_only {
    ($($callback:ident($($argument:ty),*) -> $reply:ty;)*) => {
        $(fn $callback(&self, _: &Request, $(_: $argument,)* reply: $reply) {
            reply.error(Errno::EROFS);
        })*
    };
}

impl Mountable for Filesystem {
    fn device(&self) -> Device {
        self.device.clone()
    }

    fn source(&self) -> String {
        self.view.source().display().to_string()
    }
}

impl fuser::Filesystem for Filesystem {
    /// Negotiates with the kernel. `max_readahead` stays as the kernel offers it, because the reply
    /// can only lower it (`session.rs` raises it).
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            // Send all requests of an O_DIRECT read at once, not one after the other.
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            // File handles for NFS export. They stay valid after the kernel has dropped the inode,
            // since inode numbers never change.
            InitFlags::FUSE_EXPORT_SUPPORT,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
            // Without it, shared mappings of files with direct I/O fail with ENODEV.
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ];
        for flag in wanted {
            if let Err(missing) = config.add_capabilities(flag) {
                tracing::debug!("the kernel lacks {missing:?}");
            }
        }
        // Passthrough needs CAP_SYS_ADMIN. A stacking depth of 1 leaves room for an overlay on top of
        // the mount; files of a source that lies on an overlay are then served by this process.
        self.passthrough = nix::unistd::geteuid().is_root()
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok();
        if self.view.is_mostly_verbatim() && !splice::can_splice(DEFAULT_REQUEST_BYTES) {
            config.set_max_write(SPLICEABLE_REQUEST_BYTES).map_err(rejected_setting)?;
        }
        config.set_max_background(MAX_BACKGROUND).map_err(rejected_setting)?;
        config.set_congestion_threshold(CONGESTION_THRESHOLD).map_err(rejected_setting)?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.view.lookup(Ino(parent.0), name) {
            Ok(attr) => reply.entry(&TTL, &file_attr(&attr), GENERATION),
            Err(ViewError::NotFound) => {
                // Inode 0 with a TTL: the kernel caches that there is no such name.
                let absent = Attr {
                    ino: Ino(0),
                    kind: Kind::File,
                    size: 0,
                    mtime: SystemTime::UNIX_EPOCH,
                    mode: 0,
                    uid: 0,
                    gid: 0,
                    links: 0,
                };
                reply.entry(&TTL, &file_attr(&absent), GENERATION);
            }
            Err(e) => reply.error(log_and_errno(&e)),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.view.attr(Ino(ino.0)) {
            Ok(attr) => reply.attr(&TTL, &file_attr(&attr)),
            Err(e) => reply.error(log_and_errno(&e)),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let ino = Ino(ino.0);
        if flags.acc_mode() != OpenAccMode::O_RDONLY || flags.0 & libc::O_TRUNC != 0 {
            return reply.error(Errno::EROFS);
        }
        match self.view.content(ino) {
            Ok(Content::Computed) if self.direct_io => reply.opened(NO_HANDLE, direct()),
            Ok(Content::Computed | Content::Memory) => reply.opened(NO_HANDLE, cached()),
            Ok(Content::Passthrough(file)) => self.open_host(ino, file, reply),
            Ok(Content::Status) => self.open_live(ino, reply),
            Err(e) => reply.error(log_and_errno(&e)),
        }
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = usize::try_from(size).expect("a usize has at least 32 bits");
        if handle != NO_HANDLE {
            let text = lock(&self.live).get(&handle).cloned().unwrap_or_default();
            let start = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
            let end = start.saturating_add(size).min(text.len());
            return reply.data(&text[start..end]);
        }
        let send = |file: &File, at, n| self.device.splice_reply(request.unique().0, file, at, n);
        if self.view.splice_verbatim(Ino(ino.0), offset, size, send) {
            // The reply is sent. Dropping `reply` would send another one, so leak it; it owns only a
            // reference to the session's channel.
            return mem::forget(reply);
        }
        BUFFER.with_borrow_mut(|buffer| {
            buffer.grow(size);
            match guarded(|| self.view.read(Ino(ino.0), offset, &mut buffer[..size])) {
                Ok(n) => reply.data(&buffer[..n]),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        if handle != NO_HANDLE {
            lock(&self.live).remove(&handle);
        }
        reply.ok();
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(NO_HANDLE, FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        for n in offset.. {
            match self.view.entry(Ino(ino.0), n) {
                Ok(Some(e)) => {
                    if reply.add(INodeNo(e.ino.0), n + 1, file_type(e.kind), e.name.as_ref()) {
                        break;
                    }
                }
                Ok(None) => break,
                Err(e) => return reply.error(log_and_errno(&e)),
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        for n in offset.. {
            let entry = self.view.entry(Ino(ino.0), n);
            match entry.and_then(|e| e.map(|e| Ok((self.view.attr(e.ino)?, e.name))).transpose()) {
                Ok(Some((attr, name))) => {
                    let (number, attr) = (INodeNo(attr.ino.0), file_attr(&attr));
                    if reply.add(number, n + 1, name.as_ref(), &TTL, &attr, GENERATION) {
                        break;
                    }
                }
                Ok(None) => break,
                Err(e) => return reply.error(log_and_errno(&e)),
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        const UNIT: u32 = 4096;
        const NAME_MAX: u32 = 255;
        let blocks = self.view.bytes().div_ceil(u64::from(UNIT));
        reply.statfs(blocks, 0, 0, self.view.files(), 0, UNIT, NAME_MAX, UNIT);
    }

    /// After ENOSYS the kernel answers ENOTSUP itself and sends no more of these requests.
    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, size: u32, reply: ReplyXattr) {
        if size == 0 { reply.size(0) } else { reply.data(&[]) }
    }

    /// Kernels before 5.16 do not know `FOPEN_NOFLUSH` and send this at every close.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    /// After ENOSYS the kernel treats every file as data without holes and sends no more of these
    /// requests.
    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(Errno::ENOSYS);
    }

    /// ENOTTY: no file is a terminal. Python asks that about every text file that it opens.
    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    read_only! {
        setattr(
            INodeNo, Option<u32>, Option<u32>, Option<u32>, Option<u64>, Option<TimeOrNow>,
            Option<TimeOrNow>, Option<SystemTime>, Option<FileHandle>, Option<SystemTime>,
            Option<SystemTime>, Option<SystemTime>, Option<BsdFileFlags>
        ) -> ReplyAttr;
        mknod(INodeNo, &OsStr, u32, u32, u32) -> ReplyEntry;
        mkdir(INodeNo, &OsStr, u32, u32) -> ReplyEntry;
        unlink(INodeNo, &OsStr) -> ReplyEmpty;
        rmdir(INodeNo, &OsStr) -> ReplyEmpty;
        symlink(INodeNo, &OsStr, &Path) -> ReplyEntry;
        rename(INodeNo, &OsStr, INodeNo, &OsStr, RenameFlags) -> ReplyEmpty;
        link(INodeNo, INodeNo, &OsStr) -> ReplyEntry;
        write(
            INodeNo, FileHandle, u64, &[u8], WriteFlags, OpenFlags, Option<LockOwner>
        ) -> ReplyWrite;
        create(INodeNo, &OsStr, u32, u32, i32) -> ReplyCreate;
        setxattr(INodeNo, &OsStr, &[u8], i32, u32) -> ReplyEmpty;
        removexattr(INodeNo, &OsStr) -> ReplyEmpty;
        fallocate(INodeNo, FileHandle, u64, u64, i32) -> ReplyEmpty;
    }
}
