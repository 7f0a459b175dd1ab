//! The view as the kernel asks for it: FUSE requests and errno, nothing of tensors.
//!
//! Everything is read-only and never changes, so the kernel may keep what it was told: names,
//! attributes and pages. What writes is refused with EROFS. Only live files are made anew: each
//! open file has a text of its own, read past the page cache because its size is not known before.

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

/// How long the kernel may keep names and attributes, absent names included.
const TTL: Duration = Duration::from_secs(3600);

/// `st_blksize`: what `cat`, `cp` and Python's buffered reads ask for at once. In direct mode
/// 4 KiB reads are 30 times slower.
const BLOCK_SIZE: u32 = 1 << 20;

/// Requests that the kernel may have under way for read-ahead.
const MAX_BACKGROUND: u16 = 64;

/// Of those, from how many on the kernel holds back new ones.
const CONGESTION_THRESHOLD: u16 = 48;

/// The largest request that kernels send unless they are told otherwise, in bytes.
const LARGEST_REQUEST: usize = 1 << 20;

/// The largest of a view that is mostly the source's bytes, where replies of 1 MiB cannot be spliced.
/// Such a view is read at 4.6 GB/s instead of 3.5; one that is decoded at 2.5 instead of 2.9.
const SMALLER_REQUEST: u32 = 512 << 10;

/// Numbers are never given to another file.
const GENERATION: Generation = Generation(0);

/// The handle of files that need none.
const NO_HANDLE: FileHandle = FileHandle(0);

thread_local! {
    /// What a request thread reads into, as large as its largest read: a read allocates nothing.
    static BUFFER: RefCell<Buffer> = RefCell::default();
}

/// Answers the kernel's requests from a [`View`].
pub struct Filesystem {
    view: Arc<View>,
    direct_io: bool,
    passthrough: bool,
    device: Device,
    /// Files of the source that the kernel reads itself, or was found not to. Kept for the life
    /// of the mount: one inode must not be open in both ways.
    backing: Mutex<HashMap<Ino, Option<BackingId>>>,
    /// Texts of the live files that are open.
    live: Mutex<HashMap<FileHandle, Arc<[u8]>>>,
    next_handle: AtomicU64,
}

impl Filesystem {
    /// A file system over `view`; with `direct_io`, shards are read past the page cache.
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

    /// Opens a file of the source: for the kernel to read itself where it may, else as any file.
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

/// The errno of a failure, after what is not the caller's fault has been logged.
fn failed(error: &ViewError) -> Errno {
    let errno = errno(error);
    if errno == Errno::EIO {
        let mut line = error.to_string();
        let mut cause = error.source();
        while let Some(e) = cause {
            let text = e.to_string();
            // Some messages end in that of their cause already.
            if !line.ends_with(&text) {
                line = format!("{line}: {text}");
            }
            cause = e.source();
        }
        tracing::error!("{line}");
    }
    errno
}

/// The result of what runs the code of other rooms, or the errno of its failure. A panic there is a
/// bug, but must not take the thread with it: a mount without threads hangs its readers.
fn guarded<T>(answer: impl FnOnce() -> Result<T, ViewError>) -> Result<T, Errno> {
    // Whoever shares state across threads there already copes with a thread that dies.
    match panic::catch_unwind(AssertUnwindSafe(answer)) {
        Ok(result) => result.map_err(|e| failed(&e)),
        Err(_) => {
            tracing::error!("a request was given up: the code that answers it panicked");
            Err(Errno::EIO)
        }
    }
}

/// What fuser says of a setting: the nearest that the kernel takes.
fn bounded(nearest: impl Display) -> io::Error {
    io::Error::other(format!("the nearest limit is {nearest}"))
}

/// What the caller is told.
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
    // Each map is whole between two calls, so a panic elsewhere leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pages stay from one open to the next: without it, every open fetches them again.
fn cached() -> FopenFlags {
    FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH
}

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
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// Callbacks that write: all answer EROFS.
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
    /// `max_readahead` stays as offered: it can only be lowered here (see [`super::session`]).
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            // Reads with O_DIRECT: all requests at once, not one after the other.
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            // Numbers never change, so file handles of an NFS server outlive the kernel's cache.
            InitFlags::FUSE_EXPORT_SUPPORT,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
            // Else shared mappings of direct files fail with ENODEV.
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ];
        for flag in wanted {
            if let Err(missing) = config.add_capabilities(flag) {
                tracing::debug!("the kernel lacks {missing:?}");
            }
        }
        // Depth 1 leaves room for an overlay on top of the mount; a source that itself lies on an
        // overlay is then served, not passed through.
        self.passthrough = nix::unistd::geteuid().is_root()
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok();
        if self.view.is_mostly_verbatim() && !splice::can_send(LARGEST_REQUEST) {
            config.set_max_write(SMALLER_REQUEST).map_err(bounded)?;
        }
        config.set_max_background(MAX_BACKGROUND).map_err(bounded)?;
        config.set_congestion_threshold(CONGESTION_THRESHOLD).map_err(bounded)?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.view.lookup(Ino(parent.0), name) {
            Ok(attr) => reply.entry(&TTL, &file_attr(&attr), GENERATION),
            Err(ViewError::NotFound) => {
                // Number 0 with a TTL: the kernel remembers that there is no such name.
                let none = Attr {
                    ino: Ino(0),
                    kind: Kind::File,
                    size: 0,
                    mtime: SystemTime::UNIX_EPOCH,
                    mode: 0,
                    uid: 0,
                    gid: 0,
                    links: 0,
                };
                reply.entry(&TTL, &file_attr(&none), GENERATION);
            }
            Err(e) => reply.error(failed(&e)),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.view.attr(Ino(ino.0)) {
            Ok(attr) => reply.attr(&TTL, &file_attr(&attr)),
            Err(e) => reply.error(failed(&e)),
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
            Err(e) => reply.error(failed(&e)),
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
        let send = |file: &File, at, n| self.device.send(request.unique().0, file, at, n);
        if self.view.splice_verbatim(Ino(ino.0), offset, size, send) {
            // Dropped, it would answer again. What it shares with its session lives on.
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
                Err(e) => return reply.error(failed(&e)),
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
                Err(e) => return reply.error(failed(&e)),
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

    /// ENOSYS: the kernel says ENOTSUP from then on and asks no more.
    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, size: u32, reply: ReplyXattr) {
        if size == 0 { reply.size(0) } else { reply.data(&[]) }
    }

    /// Kernels before 5.16 do not know that there is nothing to flush.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    /// ENOSYS: the kernel takes files for one extent without holes and asks no more.
    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(Errno::ENOSYS);
    }

    /// Python asks of every text file that it opens whether it is a terminal.
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
