//! The files of the mount, as a file system that knows neither FUSE nor errno.
//!
//! ```text
//! config.json                          the source's, `quantization_config` as the plan wants it
//! model-00001-of-000NN.safetensors     synthetic shards
//! model.safetensors.index.json
//! tokenizer.json …                     the source's other files, byte for byte
//! ep-0000-of-0008/…                    where the plan has directories: all of the above in each
//! .mount-ckpt/plan.json                live: text is made when opened, size 0 before
//! .mount-ckpt/stats.json
//! .mount-ckpt/metrics.prom
//! .mount-ckpt/tensors/NAME.safetensors one file for each tensor of the root
//! .mount-ckpt/ep-0000-of-0008/tensors/ and for each tensor of a directory
//! ```
//! In the per-tensor tree `%`, `/` and NUL of a name are written `%25`, `%2F` and `%00`; a tensor
//! whose file name would exceed 255 bytes has no file there.
//!
//! Names, numbers, sizes, times and bytes are fixed when the view is built and the same whenever
//! the same plan is built over the same files; live files excepted.

mod build;
mod config;
mod error;
mod header;
mod host;
mod index;
mod shard;
mod status;
mod tensors;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod tree;

use crate::tensor::to_u64;
use std::borrow::Cow;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::plan::{Summary, TensorId};
use crate::read::Engine;
use crate::source::Checkpoint;

use build::{Common, CommonBytes};
use header::Entry;
use host::Host;
use shard::Shard;
use status::{Live, Served};
use tree::{Body, Node, NodeId, Place, Tree};

pub use error::ViewError;

/// Directory of the status files.
const INTERNAL: &str = ".mount-ckpt";

const CONFIG: &str = "config.json";

/// Number of a file or directory in the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ino(pub u64);

impl Ino {
    /// The root of the view.
    pub const ROOT: Ino = Ino(1);
}

/// Whether a number stands for a directory or a file; the view holds nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    Directory,
    File,
}

/// Attributes of a file or directory, fixed when the view is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Number of the file.
    pub ino: Ino,
    /// Directory or file.
    pub kind: Kind,
    /// Bytes; 0 for directories and live files.
    pub size: u64,
    /// Newest time of the source's shards, or of the source's file where it is shown as it is.
    pub mtime: SystemTime,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// 1 for a file, 2 and one for each subdirectory for a directory.
    pub links: u32,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Number that the name leads to.
    pub ino: Ino,
    /// Directory or file.
    pub kind: Kind,
    /// `.`, `..` or the name.
    pub name: Cow<'a, str>,
}

/// How the bytes of a file come about.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content<'a> {
    /// Made by the engine as they are read: shards and the per-tensor tree.
    Computed,
    /// Lie in memory.
    Resident,
    /// Are those of this file, all of them.
    Host(&'a File),
    /// Change from one [`View::snapshot`] to the next.
    Live,
}

/// What a view looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViewOptions {
    /// Most bytes of tensors in a shard; a larger tensor has a shard of its own.
    pub shard_size: u64,
    /// Owner of everything.
    pub uid: u32,
    /// Group of everything.
    pub gid: u32,
    /// Permission bits of files.
    pub file_mode: u16,
    /// Permission bits of directories.
    pub dir_mode: u16,
}

impl Default for ViewOptions {
    /// Shards of 5 GB, the process's user and group, 0444 and 0555.
    fn default() -> ViewOptions {
        ViewOptions {
            shard_size: 5_000_000_000,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            file_mode: 0o444,
            dir_mode: 0o555,
        }
    }
}

/// The file system that a mount shows.
pub struct View {
    engine: Arc<Engine>,
    options: ViewOptions,
    tree: Tree,
    served: Served,
}

impl View {
    /// Lays out the files of the engine's plan over the source's other files.
    ///
    /// # Errors
    /// Where the plan's directories cannot be laid out.
    pub fn new(engine: Arc<Engine>, options: &ViewOptions) -> Result<View, ViewError> {
        let plan = engine.plan();
        let newest = newest_shard(engine.checkpoint());
        let common = common_files(&engine, engine.checkpoint(), newest);
        let entry_of = |id| entry(&engine, id);
        let tree = build::tree(&plan.directories, entry_of, &common, newest, options)?;
        Ok(View { engine, options: *options, tree, served: Served::new() })
    }

    /// The directory of the checkpoint that the view shows.
    pub fn source(&self) -> &Path {
        self.engine.checkpoint().dir()
    }

    /// The entry `name` of a directory; `.` and `..` are entries too.
    ///
    /// # Errors
    /// [`ViewError::NotFound`], [`ViewError::NotADirectory`].
    pub fn lookup(&self, parent: Ino, name: &OsStr) -> Result<Attr, ViewError> {
        let (id, node) = self.directory(parent)?;
        let name = name.to_str().ok_or(ViewError::NotFound)?;
        let ino = match name {
            "." => parent,
            ".." => node.parent.ino(),
            name => self.tree.child(id, name, |id| self.name(id)).ok_or(ViewError::NotFound)?,
        };
        self.attr(ino)
    }

    /// Attributes of a file or directory.
    ///
    /// # Errors
    /// [`ViewError::NotFound`].
    pub fn attr(&self, ino: Ino) -> Result<Attr, ViewError> {
        let (kind, size, mtime, links) = match self.place(ino)? {
            Place::Node(id, node) if node.body.is_directory() => {
                (Kind::Directory, 0, node.mtime, 2 + self.tree.subdirectories(id))
            }
            Place::Node(_, node) => (Kind::File, node.body.size(), node.mtime, 1),
            Place::Tensor(directory, tensor) => {
                let Place::Node(_, node) = self.place(directory.ino())? else {
                    return Err(ViewError::NotFound);
                };
                (Kind::File, self.tensor_file(tensor).size(), node.mtime, 1)
            }
        };
        let mode = match kind {
            Kind::Directory => self.options.dir_mode,
            Kind::File => self.options.file_mode,
        };
        let links = u32::try_from(links).unwrap_or(u32::MAX);
        let ViewOptions { uid, gid, .. } = self.options;
        Ok(Attr { ino, kind, size, mtime, mode, uid, gid, links })
    }

    /// The `n`th entry of a directory, or `None` behind the last: `.`, `..`, then names in order.
    ///
    /// # Errors
    /// [`ViewError::NotFound`], [`ViewError::NotADirectory`].
    pub fn entry(&self, directory: Ino, n: u64) -> Result<Option<DirEntry<'_>>, ViewError> {
        let (id, node) = self.directory(directory)?;
        let (ino, name) = match n {
            0 => (directory, Cow::Borrowed(".")),
            1 => (node.parent.ino(), Cow::Borrowed("..")),
            n => {
                let n = usize::try_from(n - 2).unwrap_or(usize::MAX);
                let Some((name, ino)) = self.tree.nth(id, n, |id| self.name(id)) else {
                    return Ok(None);
                };
                (ino, name)
            }
        };
        let kind = match self.place(ino)? {
            Place::Node(_, node) if node.body.is_directory() => Kind::Directory,
            Place::Node(..) | Place::Tensor(..) => Kind::File,
        };
        Ok(Some(DirEntry { ino, kind, name }))
    }

    /// How the bytes of a file come about.
    ///
    /// # Errors
    /// [`ViewError::NotFound`], [`ViewError::IsADirectory`], and where a file of the source
    /// cannot be opened or was replaced.
    pub(crate) fn content(&self, ino: Ino) -> Result<Content<'_>, ViewError> {
        match self.place(ino)? {
            Place::Tensor(..) => Ok(Content::Computed),
            Place::Node(_, node) => match &node.body {
                Body::Directory(_) | Body::Tensors(_) => Err(ViewError::IsADirectory),
                Body::Shard(_) => Ok(Content::Computed),
                Body::Bytes(_) => Ok(Content::Resident),
                Body::Host(host) => host.file().map(Content::Host),
                Body::Live(_) => Ok(Content::Live),
            },
        }
    }

    /// Fills `out` from the bytes of a file at `at` and returns how many there were: fewer than
    /// `out` holds only at the end of the file.
    ///
    /// Any split of a read gives the same bytes; live files excepted, whose text is made anew.
    ///
    /// # Errors
    /// [`ViewError::NotFound`], [`ViewError::IsADirectory`]; else that the bytes could not be made
    /// or read.
    pub fn read(&self, ino: Ino, at: u64, out: &mut [u8]) -> Result<usize, ViewError> {
        let done = self.read_uncounted(ino, at, out);
        self.served.count(done.as_ref().ok().map(|&n| to_u64(n)));
        done
    }

    fn read_uncounted(&self, ino: Ino, at: u64, out: &mut [u8]) -> Result<usize, ViewError> {
        let fetch = |id, at, out: &mut [u8]| self.engine.read(id, at, out);
        let failed = |source| ViewError::Read { file: self.path(ino), at, source };
        match self.place(ino)? {
            Place::Tensor(_, id) => self.tensor_file(id).read(at, out, fetch).map_err(failed),
            Place::Node(_, node) => match &node.body {
                Body::Directory(_) | Body::Tensors(_) => Err(ViewError::IsADirectory),
                Body::Shard(shard) => shard.read(at, out, fetch).map_err(failed),
                Body::Bytes(bytes) => Ok(shard::copy_from(bytes, at, out)),
                Body::Host(host) => host.read(at, out),
                Body::Live(live) => Ok(shard::copy_from(&self.render(*live), at, out)),
            },
        }
    }

    /// Has `send(file, offset, bytes)` give a reader the bytes of a file at `at`, where they lie in one
    /// piece in a file of the source, and returns whether it did. They are `len`, or fewer at the end
    /// of the file.
    pub(crate) fn send_stored(
        &self,
        ino: Ino,
        at: u64,
        len: usize,
        send: impl FnOnce(&File, u64, usize) -> bool,
    ) -> bool {
        let of_shard = |shard: &Shard| {
            let (tensor, at, n) = shard.within(at, len)?;
            let (file, offset) = self.engine.stored(tensor, at, to_u64(n))?;
            send(file, offset, n).then(|| {
                self.engine.count_stored(to_u64(n));
                n
            })
        };
        let sent = match self.tree.place(ino) {
            Some(Place::Tensor(_, id)) => of_shard(&self.tensor_file(id)),
            Some(Place::Node(_, Node { body: Body::Shard(shard), .. })) => of_shard(shard),
            Some(Place::Node(..)) | None => None,
        };
        if let Some(n) = sent {
            self.served.count(Some(to_u64(n)));
        }
        sent.is_some()
    }

    /// The text of a live file as it is now.
    ///
    /// # Errors
    /// [`ViewError::NotFound`] where the file is none.
    pub(crate) fn snapshot(&self, ino: Ino) -> Result<Vec<u8>, ViewError> {
        match self.place(ino)? {
            Place::Node(_, Node { body: Body::Live(live), .. }) => Ok(self.render(*live)),
            Place::Node(..) | Place::Tensor(..) => Err(ViewError::NotFound),
        }
    }

    /// Path of a file from the root of the view, for messages; empty for the root.
    pub(crate) fn path(&self, ino: Ino) -> String {
        match self.tree.place(ino) {
            Some(Place::Node(id, _)) => self.tree.path(id),
            Some(Place::Tensor(directory, id)) => {
                format!("{}/{}", self.tree.path(directory), tensors::file_name(self.name(id)))
            }
            None => format!("inode {}", ino.0),
        }
    }

    /// Whether more than half of its tensors' bytes are the source's own, which
    /// [`View::send_stored`] sends.
    pub(crate) fn is_mostly_stored(&self) -> bool {
        let Summary { view, verbatim, .. } = &self.engine.plan().summary;
        verbatim.1 > view.1 / 2
    }

    /// Bytes of all files, the per-tensor tree left out.
    pub(crate) fn bytes(&self) -> u64 {
        self.tree.nodes().iter().fold(0, |sum, node| sum.saturating_add(node.body.size()))
    }

    /// Number of files and directories, the per-tensor tree included.
    pub(crate) fn files(&self) -> u64 {
        let of = |node: &Node| match &node.body {
            Body::Tensors(tensors) => 1 + to_u64(tensors.len()),
            Body::Directory(_)
            | Body::Shard(_)
            | Body::Bytes(_)
            | Body::Host(_)
            | Body::Live(_) => 1,
        };
        self.tree.nodes().iter().map(of).sum()
    }

    fn place(&self, ino: Ino) -> Result<Place<'_>, ViewError> {
        self.tree.place(ino).ok_or(ViewError::NotFound)
    }

    fn directory(&self, ino: Ino) -> Result<(NodeId, &Node), ViewError> {
        match self.place(ino)? {
            Place::Node(id, node) if node.body.is_directory() => Ok((id, node)),
            Place::Node(..) | Place::Tensor(..) => Err(ViewError::NotADirectory),
        }
    }

    fn name(&self, id: TensorId) -> &str {
        entry(&self.engine, id).name
    }

    /// The file of one tensor.
    fn tensor_file(&self, id: TensorId) -> Shard {
        Shard::of_one(id, entry(&self.engine, id))
            .expect("a tensor alone takes no more bytes than the shard that holds it")
    }

    fn render(&self, live: Live) -> Vec<u8> {
        let json = |value: &Value| {
            let mut text = serde_json::to_vec_pretty(value).expect("a JSON value can be written");
            text.push(b'\n');
            text
        };
        match live {
            Live::Plan => json(&self.engine.plan().to_json()),
            Live::Stats => json(&self.stats()),
            Live::Metrics => status::prometheus(&self.stats()).into_bytes(),
        }
    }

    /// What makes the bytes of the tensors.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What `stats.json` says.
    pub(crate) fn stats(&self) -> Value {
        let engine = serde_json::to_value(self.engine.counters()).unwrap_or(Value::Null);
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "source": self.source().to_string_lossy(),
            "files": {"count": self.files(), "bytes": self.bytes()},
            "served": self.served.to_json(),
            "engine": engine,
        })
    }
}

/// What a header says of a tensor of the engine's plan.
fn entry(engine: &Engine, id: TensorId) -> Entry<'_> {
    Entry::from(engine.plan().tensor(id))
}

/// The files that every directory of the view gets: config.json and the source's other files.
fn common_files(engine: &Engine, checkpoint: &Checkpoint, newest: SystemTime) -> Vec<Common> {
    let config = checkpoint.config();
    let text = config::rewritten(config.top(), &engine.plan().config_entries);
    let changed = fs::metadata(checkpoint.dir().join(CONFIG)).and_then(|config| config.modified());
    let mut common = vec![Common {
        name: CONFIG.to_owned(),
        mtime: changed.unwrap_or(newest),
        bytes: CommonBytes::Memory(text.map_or_else(|| config.raw().into(), Arc::from)),
    }];
    for file in checkpoint.host_files() {
        let Some(name) = file.name.to_str() else {
            tracing::warn!("`{}` is left out: its name is not UTF-8", file.name.display());
            continue;
        };
        let host = Host::new(file.path.clone(), file.bytes, file.modified);
        common.push(Common {
            name: name.to_owned(),
            mtime: file.modified,
            bytes: CommonBytes::Host(Arc::new(host)),
        });
    }
    common
}

/// Newest time of the source's shards.
fn newest_shard(checkpoint: &Checkpoint) -> SystemTime {
    let changed = |shard: &crate::source::Shard| shard.file().metadata()?.modified();
    checkpoint.shards().iter().filter_map(|s| changed(s).ok()).max().unwrap_or(UNIX_EPOCH)
}
