//! The null file system, a baseline: a mount of the same view with the same settings that answers
//! every read of a shard from one buffer. What it costs is the kernel's part of a FUSE read.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use fuser::{
    FileHandle, INodeNo, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, Request,
};
use mount_ckpt::bench::{Filesystem, Mountable, mount_filesystem};
use mount_ckpt::{Ino, Kind, MountOptions, View};
use sd_notify::NotifyState;

/// Size of the buffer; no request is larger.
const BUFFER: usize = 32 << 20;

struct Null {
    view: Arc<View>,
    /// Inode numbers of the shards in the root.
    shards: HashSet<Ino>,
    real: Filesystem,
    buffer: Vec<u8>,
}

/// Mounts the null file system of `view` at `at` and serves it until it is unmounted.
pub fn serve(view: Arc<View>, at: &Path, options: &MountOptions) -> Result<()> {
    let real = Filesystem::new(Arc::clone(&view), options.direct_io);
    let shards = shards(&view)?;
    let null = Null { view, shards, real, buffer: vec![1; BUFFER] };
    let mounted = mount_filesystem(null, at, options)?;
    sd_notify::notify(&[NotifyState::Ready])?;
    Ok(mounted.wait()?)
}

/// The safetensors files in the root of a view.
fn shards(view: &View) -> Result<HashSet<Ino>> {
    let mut shards = HashSet::new();
    for n in 0.. {
        let Some(entry) = view.entry(Ino::ROOT, n)? else { break };
        if entry.kind == Kind::File && entry.name.ends_with(".safetensors") {
            shards.insert(entry.ino);
        }
    }
    Ok(shards)
}

impl Mountable for Null {
    fn source(&self) -> String {
        "null".to_owned()
    }
}

impl fuser::Filesystem for Null {
    fn init(&mut self, request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.real.init(request, config)
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.real.lookup(request, parent, name, reply);
    }

    fn getattr(&self, r: &Request, ino: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        self.real.getattr(r, ino, handle, reply);
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.real.open(request, ino, flags, reply);
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let computed = self.shards.contains(&Ino(ino.0));
        match self.view.attr(Ino(ino.0)) {
            Ok(attr) if computed => {
                let n = u64::from(size).min(attr.size.saturating_sub(offset));
                reply.data(&self.buffer[..usize::try_from(n).expect("not larger than a request")]);
            }
            _ => self.real.read(request, ino, handle, offset, size, flags, owner, reply),
        }
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        flush: bool,
        reply: ReplyEmpty,
    ) {
        self.real.release(request, ino, handle, flags, owner, flush, reply);
    }

    fn opendir(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.real.opendir(request, ino, flags, reply);
    }

    fn readdir(&self, r: &Request, ino: INodeNo, h: FileHandle, at: u64, reply: ReplyDirectory) {
        self.real.readdir(r, ino, h, at, reply);
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.real.readdirplus(request, ino, handle, offset, reply);
    }
}
