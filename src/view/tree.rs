//! The inode table: all directories and files of a view, immutable once built.
//!
//! A node's inode number is its position in the table plus 1, in the order in which nodes are
//! added; 1 is the root. Files of the per-tensor directories have no node: the file at `position`
//! in the directory with inode number `d` has the number `d * 2^32 + position`. The same plan over
//! the same files gives the same numbers.

use crate::tensor::to_u64;
use std::sync::Arc;
use std::time::SystemTime;

use crate::plan::TensorId;

use super::Ino;
use super::passthrough::PassthroughFile;
use super::shard::ViewShard;
use super::status::StatusFile;
use super::tensor_directory::{self, TensorDirectory};

/// Position of a node in the table; its inode number is one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeId(u32);

impl NodeId {
    pub(super) const ROOT: NodeId = NodeId(0);

    pub(super) fn ino(self) -> Ino {
        Ino(u64::from(self.0) + 1)
    }
}

/// A file or directory of the table.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) parent: NodeId,
    pub(super) mtime: SystemTime,
    pub(super) data: NodeData,
}

/// What a node is, and where its bytes come from.
#[derive(Debug)]
pub(super) enum NodeData {
    /// Its entries, sorted by name.
    Directory(Vec<(Box<str>, NodeId)>),
    /// A directory with one safetensors file for each tensor.
    TensorDirectory(TensorDirectory),
    /// A synthetic safetensors file: a header, then bytes from the engine.
    Shard(ViewShard),
    /// A file whose bytes are in memory: config.json and the index.
    Memory(Arc<[u8]>),
    /// A file of the source, byte for byte.
    Passthrough(Arc<PassthroughFile>),
    /// A file whose text is rendered when it is opened.
    Status(StatusFile),
}

impl NodeData {
    /// Size in bytes; 0 for directories and status files.
    pub(super) fn size(&self) -> u64 {
        match self {
            NodeData::Directory(_) | NodeData::TensorDirectory(_) | NodeData::Status(_) => 0,
            NodeData::Shard(shard) => shard.size(),
            NodeData::Memory(bytes) => to_u64(bytes.len()),
            NodeData::Passthrough(file) => file.size(),
        }
    }

    pub(super) fn is_directory(&self) -> bool {
        match self {
            NodeData::Directory(_) | NodeData::TensorDirectory(_) => true,
            NodeData::Shard(_)
            | NodeData::Memory(_)
            | NodeData::Passthrough(_)
            | NodeData::Status(_) => false,
        }
    }
}

/// What an inode number refers to.
#[derive(Clone, Copy, Debug)]
pub(super) enum InodeRef<'a> {
    Node(NodeId, &'a Node),
    /// The file of a tensor in this per-tensor directory.
    TensorFile(NodeId, TensorId),
}

/// The inode table.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// A tree of an empty root directory.
    pub(super) fn new(mtime: SystemTime) -> Tree {
        let root = Node { parent: NodeId::ROOT, mtime, data: NodeData::Directory(Vec::new()) };
        Tree { nodes: vec![root] }
    }

    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[usize::try_from(id.0).expect("a node id indexes the table")]
    }

    fn children(&self, id: NodeId) -> &[(Box<str>, NodeId)] {
        match &self.node(id).data {
            NodeData::Directory(children) => children,
            NodeData::TensorDirectory(_)
            | NodeData::Shard(_)
            | NodeData::Memory(_)
            | NodeData::Passthrough(_)
            | NodeData::Status(_) => &[],
        }
    }

    /// The node of a name; if there is none, where in the sorted entries it would be.
    fn child_node(&self, parent: NodeId, name: &str) -> Result<NodeId, usize> {
        let children = self.children(parent);
        children.binary_search_by(|(n, _)| n.as_ref().cmp(name)).map(|i| children[i].1)
    }

    /// Adds a node; `None` if the name is taken or `parent` is not a directory.
    pub(super) fn add(
        &mut self,
        parent: NodeId,
        name: &str,
        mtime: SystemTime,
        data: NodeData,
    ) -> Option<NodeId> {
        let at = self.child_node(parent, name).err()?;
        let id = NodeId(u32::try_from(self.nodes.len()).ok()?);
        let index = usize::try_from(parent.0).ok()?;
        let NodeData::Directory(children) = &mut self.nodes[index].data else { return None };
        children.insert(at, (name.into(), id));
        self.nodes.push(Node { parent, mtime, data });
        Some(id)
    }

    /// The directory of this name, created if absent; `None` if the name is not that of a plain
    /// directory.
    pub(super) fn directory(
        &mut self,
        parent: NodeId,
        name: &str,
        mtime: SystemTime,
    ) -> Option<NodeId> {
        match self.child_node(parent, name) {
            Ok(id) => matches!(self.node(id).data, NodeData::Directory(_)).then_some(id),
            Err(_) => self.add(parent, name, mtime, NodeData::Directory(Vec::new())),
        }
    }

    /// What an inode number refers to; `None` if it is not in use.
    pub(super) fn resolve(&self, ino: Ino) -> Option<InodeRef<'_>> {
        let low = u32::try_from(ino.0 & u64::from(u32::MAX)).ok()?;
        let high = u32::try_from(ino.0 >> 32).ok()?;
        let id = NodeId(if high == 0 { low } else { high }.checked_sub(1)?);
        let node = self.nodes.get(usize::try_from(id.0).ok()?)?;
        if high == 0 {
            return Some(InodeRef::Node(id, node));
        }
        let NodeData::TensorDirectory(directory) = &node.data else { return None };
        Some(InodeRef::TensorFile(id, directory.tensor(low)?))
    }

    /// The inode number of a name in a directory.
    pub(super) fn child<'a>(
        &self,
        parent: NodeId,
        name: &str,
        name_of: impl Fn(TensorId) -> &'a str,
    ) -> Option<Ino> {
        match &self.node(parent).data {
            NodeData::TensorDirectory(directory) => {
                directory.find(name, name_of).map(|position| tensor_ino(parent, position))
            }
            NodeData::Directory(_)
            | NodeData::Shard(_)
            | NodeData::Memory(_)
            | NodeData::Passthrough(_)
            | NodeData::Status(_) => self.child_node(parent, name).ok().map(NodeId::ino),
        }
    }

    /// Name and inode number of the `n`th entry of a directory, sorted by name, without `.` and
    /// `..`.
    pub(super) fn nth<'a>(
        &self,
        directory: NodeId,
        n: usize,
        name_of: impl Fn(TensorId) -> &'a str,
    ) -> Option<(std::borrow::Cow<'_, str>, Ino)> {
        if let NodeData::TensorDirectory(tensors) = &self.node(directory).data {
            let position = tensors.nth(n)?;
            let name = tensor_directory::file_name(name_of(tensors.tensor(position)?));
            return Some((name.into(), tensor_ino(directory, position)));
        }
        let (name, id) = self.children(directory).get(n)?;
        Some((name.as_ref().into(), id.ino()))
    }

    /// Number of subdirectories of a directory.
    pub(super) fn subdirectories(&self, id: NodeId) -> usize {
        self.children(id).iter().filter(|(_, c)| self.node(*c).data.is_directory()).count()
    }

    /// Path of a node from the root, without a leading slash.
    pub(super) fn path(&self, id: NodeId) -> String {
        if id == NodeId::ROOT {
            return String::new();
        }
        let parent = self.node(id).parent;
        let name = self.children(parent).iter().find(|(_, c)| *c == id).map(|(n, _)| n.as_ref());
        let mut path = self.path(parent);
        if !path.is_empty() {
            path.push('/');
        }
        path.push_str(name.unwrap_or_default());
        path
    }
}

/// The inode number of a file in a per-tensor directory.
fn tensor_ino(directory: NodeId, position: u32) -> Ino {
    Ino(directory.ino().0 << 32 | u64::from(position))
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    const T: SystemTime = UNIX_EPOCH;
    const NAMES: [&str; 3] = ["b", "a", "c/d"];

    fn name_of(id: TensorId) -> &'static str {
        NAMES[id.0 as usize]
    }

    fn bytes() -> NodeData {
        NodeData::Memory(Arc::from(&b"abc"[..]))
    }

    fn tree() -> Tree {
        let mut tree = Tree::new(T);
        let dir = tree.directory(NodeId::ROOT, "dir", T).expect("free");
        tree.add(dir, "z", T, bytes()).expect("free");
        tree.add(dir, "a", T, NodeData::Status(StatusFile::Stats)).expect("free");
        let ids = [TensorId(2), TensorId(0), TensorId(1)];
        let tensors = TensorDirectory::new(&ids, name_of);
        tree.add(NodeId::ROOT, "tensors", T, NodeData::TensorDirectory(tensors)).expect("free");
        tree
    }

    fn list(tree: &Tree, id: NodeId) -> Vec<(String, Ino)> {
        (0..).map_while(|n| tree.nth(id, n, name_of)).map(|(n, i)| (n.into_owned(), i)).collect()
    }

    #[test]
    fn inode_numbers_follow_the_order_and_resolve_to_their_entries() {
        let tree = tree();
        let own = |s: &str, ino| (s.to_owned(), Ino(ino));
        assert_eq!(list(&tree, NodeId::ROOT), [own("dir", 2), own("tensors", 5)]);
        assert_eq!(list(&tree, NodeId(1)), [own("a", 4), own("z", 3)]);
        let base = 5 << 32;
        let tensors = [
            own("a.safetensors", base + 2),
            own("b.safetensors", base + 1),
            own("c%2Fd.safetensors", base),
        ];
        assert_eq!(list(&tree, NodeId(4)), tensors);
        for directory in [NodeId::ROOT, NodeId(1), NodeId(4)] {
            for (name, ino) in list(&tree, directory) {
                assert_eq!(tree.child(directory, &name, name_of), Some(ino), "{name}");
                match tree.resolve(ino).expect("leads somewhere") {
                    InodeRef::Node(id, node) => {
                        assert_eq!((id.ino(), node.parent), (ino, directory), "{name}");
                    }
                    InodeRef::TensorFile(id, tensor) => {
                        assert_eq!(id, directory);
                        assert_eq!(tensor_directory::file_name(name_of(tensor)), name);
                    }
                }
            }
        }
    }

    #[test]
    fn unknown_inode_numbers_do_not_resolve() {
        let tree = tree();
        for ino in [0, 6, 5 << 32 | 3, 4 << 32, 6 << 32, u64::MAX, u64::from(u32::MAX)] {
            assert!(tree.resolve(Ino(ino)).is_none(), "{ino:#x}");
        }
        assert_eq!(tree.child(NodeId(1), "absent", name_of), None);
        assert_eq!(tree.child(NodeId(2), "z", name_of), None, "a file has no children");
        assert_eq!(tree.nth(NodeId(2), 0, name_of), None);
    }

    #[test]
    fn a_name_that_is_taken_is_refused() {
        let mut tree = tree();
        assert_eq!(tree.add(NodeId::ROOT, "dir", T, bytes()), None);
        assert_eq!(tree.directory(NodeId::ROOT, "dir", T), Some(NodeId(1)));
        assert_eq!(tree.directory(NodeId(1), "z", T), None);
        assert_eq!(tree.directory(NodeId::ROOT, "tensors", T), None);
        assert_eq!(tree.add(NodeId(2), "below a file", T, bytes()), None);
        assert_eq!(tree.nodes().len(), 5);
    }

    #[test]
    fn paths_and_counts() {
        let tree = tree();
        for (id, path) in [(0, ""), (1, "dir"), (2, "dir/z"), (3, "dir/a"), (4, "tensors")] {
            assert_eq!(tree.path(NodeId(id)), path);
        }
        assert_eq!(tree.subdirectories(NodeId::ROOT), 2);
        assert_eq!(tree.subdirectories(NodeId(1)), 0);
        assert_eq!(tree.node(NodeId(2)).data.size(), 3);
    }
}
