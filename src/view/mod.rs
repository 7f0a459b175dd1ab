#![doc = include_str!("README.md")]

mod build;
mod config;
mod error;
mod header;
mod index;
mod passthrough;
mod shard;
mod status;
mod tensor_directory;
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

use build::{SharedBytes, SharedFile};
use header::HeaderEntry;
use passthrough::PassthroughFile;
use shard::ViewShard;
use status::{ReadCounters, StatusFile};
use tree::{InodeRef, Node, NodeData, NodeId, Tree};

pub use error::ViewError;

/// Name of the directory that contains the status files.
pub(crate) const STATUS_DIRECTORY: &str = ".mount-ckpt";

const CONFIG: &str = "config.json";

/// Inode number of a file or directory in the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ino(pub u64);

impl Ino {
    /// The root of the view.
    pub const ROOT: Ino = Ino(1);
}

/// The type of an inode; a view contains nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    Directory,
    File,
}

/// Attributes of a file or directory, fixed when the view is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// Directory or file.
    pub kind: Kind,
    /// Size in bytes; 0 for directories and status files.
    pub size: u64,
    /// For config.json and files that are passed through: the time of the source's file. For
    /// everything else: the newest time of the source's shards.
    pub mtime: SystemTime,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Link count: 1 for a file, 2 plus the number of subdirectories for a directory.
    pub links: u32,
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Inode number.
    pub ino: Ino,
    /// Directory or file.
    pub kind: Kind,
    /// `.`, `..` or the name.
    pub name: Cow<'a, str>,
}

/// Where the bytes of a file come from, so that the caller can choose how to open it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content<'a> {
    /// The engine computes or copies them when they are read: shards and per-tensor files.
    Computed,
    /// They are in memory.
    Memory,
    /// They are those of this source file, from its first byte to its last.
    Passthrough(&'a File),
    /// They change: [`View::snapshot`] renders them.
    Status,
}

/// Sizes, owners and permissions of the files of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViewOptions {
    /// Most bytes of tensors in a shard; a larger tensor gets its own shard.
    pub shard_size: u64,
    /// Owner of all files and directories.
    pub uid: u32,
    /// Group of all files and directories.
    pub gid: u32,
    /// Permission bits of files.
    pub file_mode: u16,
    /// Permission bits of directories.
    pub dir_mode: u16,
}

impl Default for ViewOptions {
    /// Shards of 5 GB, the user and group of the process, modes 0444 and 0555.
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

/// The file system of a mount: read-only, immutable, shared by all threads.
pub struct View {
    engine: Arc<Engine>,
    options: ViewOptions,
    tree: Tree,
    counters: ReadCounters,
}

impl View {
    /// Builds the inode table: the shards of the engine's plan, and the source's other files. Reads
    /// no tensor.
    ///
    /// # Errors
    /// If a directory name of the plan cannot be used, or a directory exceeds 2^64 bytes.
    pub fn new(engine: Arc<Engine>, options: &ViewOptions) -> Result<View, ViewError> {
        let plan = engine.plan();
        let newest = newest_shard(engine.checkpoint());
        let shared = shared_files(&engine, engine.checkpoint(), newest);
        let entry_of = |id| header_entry(&engine, id);
        let tree = build::tree(&plan.directories, entry_of, &shared, newest, options)?;
        Ok(View { engine, options: *options, tree, counters: ReadCounters::new() })
    }

    /// The directory of the source checkpoint.
    pub fn source(&self) -> &Path {
        self.engine.checkpoint().dir()
    }

    /// Attributes of the entry `name` of a directory; `.` and `..` are entries too.
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
        let (kind, size, mtime, links) = match self.resolve(ino)? {
            InodeRef::Node(id, node) if node.data.is_directory() => {
                (Kind::Directory, 0, node.mtime, 2 + self.tree.subdirectories(id))
            }
            InodeRef::Node(_, node) => (Kind::File, node.data.size(), node.mtime, 1),
            InodeRef::TensorFile(directory, tensor) => {
                let InodeRef::Node(_, node) = self.resolve(directory.ino())? else {
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

    /// The `n`th entry of a directory: `.`, `..`, then the others sorted by name. `None` after the
    /// last.
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
        let kind = match self.resolve(ino)? {
            InodeRef::Node(_, node) if node.data.is_directory() => Kind::Directory,
            InodeRef::Node(..) | InodeRef::TensorFile(..) => Kind::File,
        };
        Ok(Some(DirEntry { ino, kind, name }))
    }

    /// Where the bytes of a file come from.
    ///
    /// # Errors
    /// [`ViewError::NotFound`], [`ViewError::IsADirectory`], or the error of a source file that
    /// cannot be opened or was replaced.
    pub(crate) fn content(&self, ino: Ino) -> Result<Content<'_>, ViewError> {
        match self.resolve(ino)? {
            InodeRef::TensorFile(..) => Ok(Content::Computed),
            InodeRef::Node(_, node) => match &node.data {
                NodeData::Directory(_) | NodeData::TensorDirectory(_) => {
                    Err(ViewError::IsADirectory)
                }
                NodeData::Shard(_) => Ok(Content::Computed),
                NodeData::Memory(_) => Ok(Content::Memory),
                NodeData::Passthrough(file) => file.file().map(Content::Passthrough),
                NodeData::Status(_) => Ok(Content::Status),
            },
        }
    }

    /// Reads bytes of a file from offset `at` into `out` and returns how many: less than
    /// `out.len()` only at the end of the file.
    ///
    /// Any split of a read gives the same bytes, except for status files: each read renders them
    /// anew.
    ///
    /// # Errors
    /// [`ViewError::NotFound`], [`ViewError::IsADirectory`], or the error of the engine or of a
    /// source file.
    pub fn read(&self, ino: Ino, at: u64, out: &mut [u8]) -> Result<usize, ViewError> {
        let done = self.read_uncounted(ino, at, out);
        self.counters.count(done.as_ref().ok().map(|&n| to_u64(n)));
        done
    }

    fn read_uncounted(&self, ino: Ino, at: u64, out: &mut [u8]) -> Result<usize, ViewError> {
        let fetch = |id, at, out: &mut [u8]| self.engine.read(id, at, out);
        let failed = |source| ViewError::Read { file: self.path(ino), at, source };
        match self.resolve(ino)? {
            InodeRef::TensorFile(_, id) => {
                self.tensor_file(id).read(at, out, fetch).map_err(failed)
            }
            InodeRef::Node(_, node) => match &node.data {
                NodeData::Directory(_) | NodeData::TensorDirectory(_) => {
                    Err(ViewError::IsADirectory)
                }
                NodeData::Shard(shard) => shard.read(at, out, fetch).map_err(failed),
                NodeData::Memory(bytes) => Ok(shard::copy_from(bytes, at, out)),
                NodeData::Passthrough(file) => file.read(at, out),
                NodeData::Status(file) => Ok(shard::copy_from(&self.render(*file), at, out)),
            },
        }
    }

    /// Serves a read without copying, if its bytes are contiguous and unchanged in a file of the
    /// source: calls `send(file, offset, bytes)`, which transfers them (by splice) and returns
    /// whether it did. Returns whether the read was served. `bytes` is `len`, or less at the end of
    /// the file.
    pub(crate) fn splice_verbatim(
        &self,
        ino: Ino,
        at: u64,
        len: usize,
        send: impl FnOnce(&File, u64, usize) -> bool,
    ) -> bool {
        let of_shard = |shard: &ViewShard| {
            let (tensor, at, n) = shard.within(at, len)?;
            let (file, offset) = self.engine.verbatim_location(tensor, at, to_u64(n))?;
            send(file, offset, n).then(|| {
                self.engine.count_spliced(to_u64(n));
                n
            })
        };
        let sent = match self.tree.resolve(ino) {
            Some(InodeRef::TensorFile(_, id)) => of_shard(&self.tensor_file(id)),
            Some(InodeRef::Node(_, Node { data: NodeData::Shard(shard), .. })) => of_shard(shard),
            Some(InodeRef::Node(..)) | None => None,
        };
        if let Some(n) = sent {
            self.counters.count(Some(to_u64(n)));
        }
        sent.is_some()
    }

    /// Renders the current text of a status file.
    ///
    /// # Errors
    /// [`ViewError::NotFound`] if it is not a status file.
    pub(crate) fn snapshot(&self, ino: Ino) -> Result<Vec<u8>, ViewError> {
        match self.resolve(ino)? {
            InodeRef::Node(_, Node { data: NodeData::Status(file), .. }) => Ok(self.render(*file)),
            InodeRef::Node(..) | InodeRef::TensorFile(..) => Err(ViewError::NotFound),
        }
    }

    /// Path of a file relative to the root of the view, for messages; empty for the root.
    pub(crate) fn path(&self, ino: Ino) -> String {
        match self.tree.resolve(ino) {
            Some(InodeRef::Node(id, _)) => self.tree.path(id),
            Some(InodeRef::TensorFile(directory, id)) => {
                format!(
                    "{}/{}",
                    self.tree.path(directory),
                    tensor_directory::file_name(self.name(id))
                )
            }
            None => format!("inode {}", ino.0),
        }
    }

    /// Whether more than half of the bytes of its tensors are verbatim, so that most reads are
    /// served by [`View::splice_verbatim`].
    pub(crate) fn is_mostly_verbatim(&self) -> bool {
        let Summary { view, verbatim, .. } = &self.engine.plan().summary;
        verbatim.1 > view.1 / 2
    }

    /// Total size of all files except the per-tensor ones, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.tree.nodes().iter().fold(0, |sum, node| sum.saturating_add(node.data.size()))
    }

    /// Number of files and directories, the per-tensor ones included.
    pub(crate) fn files(&self) -> u64 {
        let of = |node: &Node| match &node.data {
            NodeData::TensorDirectory(tensors) => 1 + to_u64(tensors.len()),
            NodeData::Directory(_)
            | NodeData::Shard(_)
            | NodeData::Memory(_)
            | NodeData::Passthrough(_)
            | NodeData::Status(_) => 1,
        };
        self.tree.nodes().iter().map(of).sum()
    }

    fn resolve(&self, ino: Ino) -> Result<InodeRef<'_>, ViewError> {
        self.tree.resolve(ino).ok_or(ViewError::NotFound)
    }

    fn directory(&self, ino: Ino) -> Result<(NodeId, &Node), ViewError> {
        match self.resolve(ino)? {
            InodeRef::Node(id, node) if node.data.is_directory() => Ok((id, node)),
            InodeRef::Node(..) | InodeRef::TensorFile(..) => Err(ViewError::NotADirectory),
        }
    }

    fn name(&self, id: TensorId) -> &str {
        header_entry(&self.engine, id).name
    }

    /// The safetensors file of one tensor.
    fn tensor_file(&self, id: TensorId) -> ViewShard {
        ViewShard::of_one(id, header_entry(&self.engine, id))
            .expect("its file is not larger than the shard that contains the tensor")
    }

    fn render(&self, file: StatusFile) -> Vec<u8> {
        let json = |value: &Value| {
            let mut text = serde_json::to_vec_pretty(value).expect("a JSON value can be written");
            text.push(b'\n');
            text
        };
        match file {
            StatusFile::Plan => json(&self.engine.plan().to_json()),
            StatusFile::Stats => json(&self.stats()),
            StatusFile::Metrics => status::prometheus(&self.stats()).into_bytes(),
        }
    }

    /// The engine that serves the tensors.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The contents of `stats.json`.
    pub(crate) fn stats(&self) -> Value {
        let engine = serde_json::to_value(self.engine.counters()).unwrap_or(Value::Null);
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "source": self.source().to_string_lossy(),
            "files": {"count": self.files(), "bytes": self.bytes()},
            "served": self.counters.to_json(),
            "engine": engine,
        })
    }
}

/// What a safetensors header says about a tensor of the engine's plan.
fn header_entry(engine: &Engine, id: TensorId) -> HeaderEntry<'_> {
    HeaderEntry::from(engine.plan().tensor(id))
}

/// The files that appear in every directory: config.json and the source's other files.
fn shared_files(engine: &Engine, checkpoint: &Checkpoint, newest: SystemTime) -> Vec<SharedFile> {
    let config = checkpoint.config();
    let text = config::rewritten(config.top(), &engine.plan().config_entries);
    let modified = fs::metadata(checkpoint.dir().join(CONFIG)).and_then(|config| config.modified());
    let mut shared = vec![SharedFile {
        name: CONFIG.to_owned(),
        mtime: modified.unwrap_or(newest),
        bytes: SharedBytes::Memory(text.map_or_else(|| config.raw().into(), Arc::from)),
    }];
    for file in checkpoint.host_files() {
        let Some(name) = file.name.to_str() else {
            tracing::warn!("`{}` is left out: its name is not UTF-8", file.name.display());
            continue;
        };
        let source = PassthroughFile::new(file.path.clone(), file.bytes, file.modified);
        shared.push(SharedFile {
            name: name.to_owned(),
            mtime: file.modified,
            bytes: SharedBytes::Passthrough(Arc::new(source)),
        });
    }
    shared
}

/// The newest modification time of the source's shards.
fn newest_shard(checkpoint: &Checkpoint) -> SystemTime {
    let modified = |shard: &crate::source::Shard| shard.file().metadata()?.modified();
    checkpoint.shards().iter().filter_map(|s| modified(s).ok()).max().unwrap_or(UNIX_EPOCH)
}
