//! Builds the inode table: for each directory of the plan its shards, index and other files.

use std::sync::Arc;
use std::time::SystemTime;

use crate::plan::{Directory, TensorId};
use crate::source::INDEX;

use super::header::HeaderEntry;
use super::index::index;
use super::passthrough::PassthroughFile;
use super::shard::{self, ViewShard};
use super::status::StatusFile;
use super::tensor_directory::TensorDirectory;
use super::tree::{NodeData, NodeId, Tree};
use super::{STATUS_DIRECTORY, ViewError, ViewOptions};

/// A file that appears in every directory of the view.
#[derive(Clone, Debug)]
pub(super) struct SharedFile {
    /// Path relative to the directory, with slashes.
    pub(super) name: String,
    pub(super) mtime: SystemTime,
    pub(super) bytes: SharedBytes,
}

/// Where the bytes of a [`SharedFile`] are.
#[derive(Clone, Debug)]
pub(super) enum SharedBytes {
    Memory(Arc<[u8]>),
    Passthrough(Arc<PassthroughFile>),
}

/// Builds the tree of `directories`. Every directory and the root get the files `shared`. Shards
/// and the index are added first, so their names win.
pub(super) fn tree<'a>(
    directories: &[Directory],
    entry_of: impl Fn(TensorId) -> HeaderEntry<'a> + Copy,
    shared: &[SharedFile],
    mtime: SystemTime,
    options: &ViewOptions,
) -> Result<Tree, ViewError> {
    let mut tree = Tree::new(mtime);
    let internal =
        tree.directory(NodeId::ROOT, STATUS_DIRECTORY, mtime).expect("the root is empty");
    for (file, name) in StatusFile::ALL {
        tree.add(internal, name, mtime, NodeData::Status(file)).expect("the names are distinct");
    }
    for directory in directories {
        let refuse = || ViewError::DirectoryName { name: directory.name.clone() };
        let (top, status) = match directory.name.as_str() {
            "" => (NodeId::ROOT, internal),
            "." | ".." | STATUS_DIRECTORY => return Err(refuse()),
            name if name.contains(['/', '\0']) => return Err(refuse()),
            name => (
                tree.directory(NodeId::ROOT, name, mtime).ok_or_else(refuse)?,
                tree.directory(internal, name, mtime).ok_or_else(refuse)?,
            ),
        };
        add_shards(&mut tree, top, directory, entry_of, mtime, options.shard_size)?;
        add_shared_files(&mut tree, top, shared, mtime);
        let tensors = TensorDirectory::new(&directory.tensors, |id| entry_of(id).name);
        tree.add(status, "tensors", mtime, NodeData::TensorDirectory(tensors))
            .ok_or_else(refuse)?;
    }
    if !directories.iter().any(|d| d.name.is_empty()) {
        add_shared_files(&mut tree, NodeId::ROOT, shared, mtime);
    }
    Ok(tree)
}

/// Adds the shards of a directory and their index.
///
/// A single shard is called `model-00001-of-00001.safetensors` and has an index too, so that a view
/// looks the same whatever its size; transformers, vLLM and DCP's reader all accept it.
fn add_shards<'a>(
    tree: &mut Tree,
    top: NodeId,
    directory: &Directory,
    entry_of: impl Fn(TensorId) -> HeaderEntry<'a> + Copy,
    mtime: SystemTime,
    shard_size: u64,
) -> Result<(), ViewError> {
    let tensors = &directory.tensors;
    let taken = || ViewError::DirectoryName { name: directory.name.clone() };
    let too_large = || ViewError::TooLarge { directory: directory.name.clone() };
    let shards = shard::split_into_shards(tensors.iter().map(|&id| entry_of(id)), shard_size);
    let names: Vec<String> = (1..=shards.len())
        .map(|i| format!("model-{i:05}-of-{:05}.safetensors", shards.len()))
        .collect();
    let mut map = Vec::with_capacity(tensors.len());
    let mut total = 0u64;
    for (range, name) in shards.into_iter().zip(&names) {
        let entries: Vec<_> = tensors[range].iter().map(|&id| (id, entry_of(id))).collect();
        for (_, entry) in &entries {
            map.push((entry.name, name.as_str()));
            total = total.checked_add(entry.bytes).ok_or_else(too_large)?;
        }
        let file = || format!("{}/{name}", directory.name).trim_start_matches('/').to_owned();
        let shard =
            ViewShard::new(entries).map_err(|source| ViewError::Header { file: file(), source })?;
        tree.add(top, name, mtime, NodeData::Shard(shard)).ok_or_else(taken)?;
    }
    let index = NodeData::Memory(index(total, map).into());
    tree.add(top, INDEX, mtime, index).ok_or_else(taken)?;
    Ok(())
}

/// Adds the files that appear in every directory. If a name is taken, the existing file stays.
fn add_shared_files(tree: &mut Tree, top: NodeId, shared: &[SharedFile], mtime: SystemTime) {
    for file in shared {
        let (parents, name) = file.name.rsplit_once('/').unwrap_or(("", &file.name));
        let parent = parents
            .split('/')
            .filter(|part| !part.is_empty())
            .try_fold(top, |parent, part| tree.directory(parent, part, mtime));
        let data = match &file.bytes {
            SharedBytes::Memory(bytes) => NodeData::Memory(Arc::clone(bytes)),
            SharedBytes::Passthrough(file) => NodeData::Passthrough(Arc::clone(file)),
        };
        if parent.and_then(|parent| tree.add(parent, name, file.mtime, data)).is_none() {
            tracing::warn!("`{}` of the source is hidden by a file of the view", file.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::tensor::{DType, Shape};
    use crate::view::tree::InodeRef;

    const T: SystemTime = UNIX_EPOCH;

    struct Tensor(String, Shape);

    fn tensors(n: u64) -> Vec<Tensor> {
        (0..n).map(|i| Tensor(format!("layers.{i}.weight"), Shape::from([i, 2]))).collect()
    }

    fn entry_of<'a>(tensors: &'a [Tensor]) -> impl Fn(TensorId) -> HeaderEntry<'a> + Copy {
        |id| {
            let Tensor(name, shape) = &tensors[id.0 as usize];
            let bytes = shape.bytes(DType::BF16).expect("small");
            HeaderEntry { name, dtype: DType::BF16, shape, bytes }
        }
    }

    fn directory(name: &str, ids: std::ops::Range<u32>) -> Directory {
        Directory { name: name.to_owned(), tensors: ids.map(TensorId).collect() }
    }

    fn options(shard_size: u64) -> ViewOptions {
        ViewOptions { shard_size, ..ViewOptions::default() }
    }

    fn common(names: &[&str]) -> Vec<SharedFile> {
        let bytes = SharedBytes::Memory(Arc::from(&b"text"[..]));
        let mtime = T + Duration::from_secs(7);
        names
            .iter()
            .map(|n| SharedFile { name: n.to_string(), mtime, bytes: bytes.clone() })
            .collect()
    }

    /// Path, inode number and size of every entry, depth first.
    fn walk(tree: &Tree, tensors: &[Tensor]) -> Vec<(String, u64, u64)> {
        fn below(
            tree: &Tree,
            id: NodeId,
            tensors: &[Tensor],
            path: &str,
            out: &mut Vec<(String, u64, u64)>,
        ) {
            for n in 0.. {
                let name_of = |id: TensorId| tensors[id.0 as usize].0.as_str();
                let Some((name, ino)) = tree.nth(id, n, name_of) else { break };
                let path = format!("{path}{name}");
                match tree.resolve(ino).expect("listed") {
                    InodeRef::Node(id, node) if node.data.is_directory() => {
                        out.push((format!("{path}/"), ino.0, 0));
                        below(tree, id, tensors, &format!("{path}/"), out);
                    }
                    InodeRef::Node(_, node) => out.push((path, ino.0, node.data.size())),
                    InodeRef::TensorFile(..) => out.push((path, ino.0, 0)),
                }
            }
        }
        let mut out = Vec::new();
        below(tree, NodeId::ROOT, tensors, "", &mut out);
        out
    }

    fn paths(tree: &Tree, tensors: &[Tensor]) -> Vec<String> {
        walk(tree, tensors).into_iter().map(|(path, ..)| path).collect()
    }

    #[test]
    fn one_directory_has_shards_index_files_and_status() {
        let tensors = tensors(4);
        let files = common(&["config.json", "sub/deep/x.py", "sub/y.txt"]);
        let plan = [directory("", 0..4)];
        let tree = tree(&plan, entry_of(&tensors), &files, T, &options(12)).expect("valid");
        assert_eq!(
            paths(&tree, &tensors),
            [
                ".mount-ckpt/",
                ".mount-ckpt/metrics.prom",
                ".mount-ckpt/plan.json",
                ".mount-ckpt/stats.json",
                ".mount-ckpt/tensors/",
                ".mount-ckpt/tensors/layers.0.weight.safetensors",
                ".mount-ckpt/tensors/layers.1.weight.safetensors",
                ".mount-ckpt/tensors/layers.2.weight.safetensors",
                ".mount-ckpt/tensors/layers.3.weight.safetensors",
                "config.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "sub/",
                "sub/deep/",
                "sub/deep/x.py",
                "sub/y.txt",
            ]
        );
        let size = |path: &str| {
            walk(&tree, &tensors).into_iter().find(|(p, ..)| p == path).map(|(.., n)| n)
        };
        assert_eq!(size("model-00001-of-00002.safetensors"), Some(4096 + 12));
        assert_eq!(size("model-00002-of-00002.safetensors"), Some(4096 + 12));
        assert_eq!(size("config.json"), Some(4));
    }

    #[test]
    fn every_rank_has_a_directory_of_its_own() {
        let tensors = tensors(3);
        let plan = [directory("ep-0000-of-0002", 0..2), directory("ep-0001-of-0002", 1..3)];
        let files = common(&["config.json"]);
        let tree = tree(&plan, entry_of(&tensors), &files, T, &options(99)).expect("valid");
        let got = paths(&tree, &tensors);
        for path in [
            ".mount-ckpt/ep-0001-of-0002/tensors/layers.2.weight.safetensors",
            "config.json",
            "ep-0000-of-0002/config.json",
            "ep-0000-of-0002/model-00001-of-00001.safetensors",
            "ep-0000-of-0002/model.safetensors.index.json",
            "ep-0001-of-0002/config.json",
        ] {
            assert!(got.iter().any(|p| p == path), "{path} is missing in {got:?}");
        }
        assert!(!got.iter().any(|p| p.starts_with("model")), "{got:?}");
    }

    #[test]
    fn the_same_plan_gives_the_same_inode_numbers() {
        let tensors = tensors(9);
        let files = common(&["config.json", "a/b"]);
        let make = || {
            let plan = [directory("", 0..5), directory("ep-0000-of-0001", 3..9)];
            let tree = tree(&plan, entry_of(&tensors), &files, T, &options(20)).expect("valid");
            walk(&tree, &tensors)
        };
        let walked = make();
        assert_eq!(walked, make());
        let mut numbers: Vec<u64> = walked.iter().map(|(_, ino, _)| *ino).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), walked.len(), "two entries have one inode number");
    }

    #[test]
    fn names_of_the_view_hide_those_of_the_source() {
        let tensors = tensors(2);
        let files = common(&["model.safetensors.index.json", "model-00001-of-00001.safetensors/x"]);
        let plan = [directory("", 0..2)];
        let tree = tree(&plan, entry_of(&tensors), &files, T, &options(99)).expect("valid");
        let root: Vec<String> =
            paths(&tree, &tensors).into_iter().filter(|p| !p.starts_with('.')).collect();
        assert_eq!(root, ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]);
    }

    #[test]
    fn invalid_directories_are_refused() {
        for name in ["..", ".", "a/b", "a\0", ".mount-ckpt", "model.safetensors.index.json"] {
            let plan = [directory("", 0..0), directory(name, 0..0)];
            let error = tree(&plan, entry_of(&[]), &[], T, &options(9)).expect_err(name);
            assert!(matches!(error, ViewError::DirectoryName { .. }), "{name}: {error}");
        }
        // Nine times a little less than 2^61 bytes is more than 2^64.
        let huge = [Tensor("a".into(), Shape::from([(1 << 60) - 1]))];
        let plan = [Directory { name: String::new(), tensors: vec![TensorId(0); 9] }];
        let error = tree(&plan, entry_of(&huge), &[], T, &options(9)).expect_err("too large");
        assert!(matches!(error, ViewError::TooLarge { .. }), "{error}");
    }
}
