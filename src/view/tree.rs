//! The inode table: directories, files and their numbers, fixed when it is built.
//!
//! Nodes are numbered from 1, the root, in the order in which they are added. Files of the
//! per-tensor tree have no node; the number of the one at `position` in the directory with number
//! `d` is `d * 2^32 + position`. The same plan over the same files gives the same numbers.

use crate::tensor::to_u64;
use std::sync::Arc;
use std::time::SystemTime;

use crate::plan::TensorId;

use super::Ino;
use super::host::Host;
use super::shard::Shard;
use super::status::Live;
use super::tensors::{self, TensorDirectory};

/// Index of a node; its number is one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeId(u32);

impl NodeId {
    pub(super) const ROOT: NodeId = NodeId(0);

    pub(super) fn ino(self) -> Ino {
        Ino(u64::from(self.0) + 1)
    }
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) parent: NodeId,
    pub(super) mtime: SystemTime,
    pub(super) body: Body,
}

/// What stands behind a number of the table.
#[derive(Debug)]
pub(super) enum Body {
    /// Names in order, and their nodes.
    Directory(Vec<(Box<str>, NodeId)>),
    /// The directory of one file for each tensor.
    Tensors(TensorDirectory),
    Shard(Shard),
    Bytes(Arc<[u8]>),
    Host(Arc<Host>),
    Live(Live),
}

impl Body {
    /// Bytes of the file; 0 for what has no size before it is read.
    pub(super) fn size(&self) -> u64 {
        match self {
            Body::Directory(_) | Body::Tensors(_) | Body::Live(_) => 0,
            Body::Shard(shard) => shard.size(),
            Body::Bytes(bytes) => to_u64(bytes.len()),
            Body::Host(host) => host.size(),
        }
    }

    pub(super) fn is_directory(&self) -> bool {
        match self {
            Body::Directory(_) | Body::Tensors(_) => true,
            Body::Shard(_) | Body::Bytes(_) | Body::Host(_) | Body::Live(_) => false,
        }
    }
}

/// Where a number leads.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place<'a> {
    Node(NodeId, &'a Node),
    /// A file of the per-tensor tree in this directory.
    Tensor(NodeId, TensorId),
}

#[derive(Debug)]
pub(super) struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// An empty root.
    pub(super) fn new(mtime: SystemTime) -> Tree {
        let root = Node { parent: NodeId::ROOT, mtime, body: Body::Directory(Vec::new()) };
        Tree { nodes: vec![root] }
    }

    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[usize::try_from(id.0).expect("a node id indexes the table")]
    }

    fn children(&self, id: NodeId) -> &[(Box<str>, NodeId)] {
        match &self.node(id).body {
            Body::Directory(children) => children,
            Body::Tensors(_) | Body::Shard(_) | Body::Bytes(_) | Body::Host(_) | Body::Live(_) => {
                &[]
            }
        }
    }

    fn child_node(&self, parent: NodeId, name: &str) -> Result<NodeId, usize> {
        let children = self.children(parent);
        children.binary_search_by(|(n, _)| n.as_ref().cmp(name)).map(|i| children[i].1)
    }

    /// Adds a node, unless the name is taken or `parent` is no directory.
    pub(super) fn add(
        &mut self,
        parent: NodeId,
        name: &str,
        mtime: SystemTime,
        body: Body,
    ) -> Option<NodeId> {
        let at = self.child_node(parent, name).err()?;
        let id = NodeId(u32::try_from(self.nodes.len()).ok()?);
        let index = usize::try_from(parent.0).ok()?;
        let Body::Directory(children) = &mut self.nodes[index].body else { return None };
        children.insert(at, (name.into(), id));
        self.nodes.push(Node { parent, mtime, body });
        Some(id)
    }

    /// The directory of this name, made where there is none; `None` where a file has the name.
    pub(super) fn directory(
        &mut self,
        parent: NodeId,
        name: &str,
        mtime: SystemTime,
    ) -> Option<NodeId> {
        match self.child_node(parent, name) {
            Ok(id) => matches!(self.node(id).body, Body::Directory(_)).then_some(id),
            Err(_) => self.add(parent, name, mtime, Body::Directory(Vec::new())),
        }
    }

    /// Where a number leads, or `None` where it leads nowhere.
    pub(super) fn place(&self, ino: Ino) -> Option<Place<'_>> {
        let low = u32::try_from(ino.0 & u64::from(u32::MAX)).ok()?;
        let high = u32::try_from(ino.0 >> 32).ok()?;
        let id = NodeId(if high == 0 { low } else { high }.checked_sub(1)?);
        let node = self.nodes.get(usize::try_from(id.0).ok()?)?;
        if high == 0 {
            return Some(Place::Node(id, node));
        }
        let Body::Tensors(directory) = &node.body else { return None };
        Some(Place::Tensor(id, directory.tensor(low)?))
    }

    /// The number of a name in a directory.
    pub(super) fn child<'a>(
        &self,
        parent: NodeId,
        name: &str,
        name_of: impl Fn(TensorId) -> &'a str,
    ) -> Option<Ino> {
        match &self.node(parent).body {
            Body::Tensors(directory) => {
                directory.find(name, name_of).map(|position| tensor_ino(parent, position))
            }
            Body::Directory(_)
            | Body::Shard(_)
            | Body::Bytes(_)
            | Body::Host(_)
            | Body::Live(_) => self.child_node(parent, name).ok().map(NodeId::ino),
        }
    }

    /// Name and number of the `n`th entry of a directory, by name; without `.` and `..`.
    pub(super) fn nth<'a>(
        &self,
        directory: NodeId,
        n: usize,
        name_of: impl Fn(TensorId) -> &'a str,
    ) -> Option<(std::borrow::Cow<'_, str>, Ino)> {
        if let Body::Tensors(tensors) = &self.node(directory).body {
            let position = tensors.nth(n)?;
            let name = tensors::file_name(name_of(tensors.tensor(position)?));
            return Some((name.into(), tensor_ino(directory, position)));
        }
        let (name, id) = self.children(directory).get(n)?;
        Some((name.as_ref().into(), id.ino()))
    }

    /// Number of directories in a directory.
    pub(super) fn subdirectories(&self, id: NodeId) -> usize {
        self.children(id).iter().filter(|(_, c)| self.node(*c).body.is_directory()).count()
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

    fn bytes() -> Body {
        Body::Bytes(Arc::from(&b"abc"[..]))
    }

    fn tree() -> Tree {
        let mut tree = Tree::new(T);
        let dir = tree.directory(NodeId::ROOT, "dir", T).expect("free");
        tree.add(dir, "z", T, bytes()).expect("free");
        tree.add(dir, "a", T, Body::Live(Live::Stats)).expect("free");
        let ids = [TensorId(2), TensorId(0), TensorId(1)];
        let tensors = TensorDirectory::new(&ids, name_of);
        tree.add(NodeId::ROOT, "tensors", T, Body::Tensors(tensors)).expect("free");
        tree
    }

    fn list(tree: &Tree, id: NodeId) -> Vec<(String, Ino)> {
        (0..).map_while(|n| tree.nth(id, n, name_of)).map(|(n, i)| (n.into_owned(), i)).collect()
    }

    #[test]
    fn numbers_follow_from_the_order_and_lead_back() {
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
                match tree.place(ino).expect("leads somewhere") {
                    Place::Node(id, node) => {
                        assert_eq!((id.ino(), node.parent), (ino, directory), "{name}");
                    }
                    Place::Tensor(id, tensor) => {
                        assert_eq!(id, directory);
                        assert_eq!(tensors::file_name(name_of(tensor)), name);
                    }
                }
            }
        }
    }

    #[test]
    fn numbers_that_nobody_has_lead_nowhere() {
        let tree = tree();
        for ino in [0, 6, 5 << 32 | 3, 4 << 32, 6 << 32, u64::MAX, u64::from(u32::MAX)] {
            assert!(tree.place(Ino(ino)).is_none(), "{ino:#x}");
        }
        assert_eq!(tree.child(NodeId(1), "absent", name_of), None);
        assert_eq!(tree.child(NodeId(2), "z", name_of), None, "a file has no children");
        assert_eq!(tree.nth(NodeId(2), 0, name_of), None);
    }

    #[test]
    fn a_name_is_given_once() {
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
        assert_eq!(tree.node(NodeId(2)).body.size(), 3);
    }
}
