//! Checkpoints at the full size of a published release, written as sparse files without data: a
//! terabyte takes a few megabytes on disk.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::release::{Entry, bytes_of};

/// Maximum bytes of tensors in a shard. A larger tensor gets its own shard.
const SHARD_BYTES: u64 = 5_000_000_000;

/// A checkpoint directory of sparse files. Dropping this value deletes it.
pub struct Sparse {
    dir: tempfile::TempDir,
    /// Name, shard number and size in bytes of every tensor.
    places: Vec<(String, usize, u64)>,
    shards: usize,
}

impl Sparse {
    /// Writes shards, their index, and `files`. `weight_shape` tensors get their real values.
    pub fn write(entries: &[Entry], files: &[(String, Vec<u8>)]) -> Sparse {
        let mut shards: Vec<Vec<&Entry>> = vec![Vec::new()];
        let mut used = 0;
        for entry in entries {
            let bytes = bytes_of(&entry.1, &entry.2);
            if used > 0 && used + bytes > SHARD_BYTES {
                shards.push(Vec::new());
                used = 0;
            }
            shards.last_mut().unwrap().push(entry);
            used += bytes;
        }
        let packed: BTreeMap<&str, &[u64]> = entries
            .iter()
            .filter_map(|(name, _, shape)| Some((name.strip_suffix("_packed")?, &shape[..])))
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let mut places = Vec::with_capacity(entries.len());
        for (i, tensors) in shards.iter().enumerate() {
            write_shard(&dir.path().join(shard_name(i, shards.len())), tensors, &packed);
            let place = |(name, dtype, shape): &&Entry| (name.clone(), i, bytes_of(dtype, shape));
            places.extend(tensors.iter().map(place));
        }
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let sparse = Sparse { dir, places, shards: shards.len() };
        sparse.index_without(|_| false);
        sparse
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes an index without the tensors for which `lacks` returns true. Tensors that the index
    /// does not list are not part of the checkpoint.
    pub fn index_without(&self, lacks: impl Fn(&str) -> bool) {
        let listed = self.places.iter().filter(|(name, ..)| !lacks(name));
        let total: u64 = listed.clone().map(|(.., bytes)| bytes).sum();
        let mut text = format!("{{\"metadata\":{{\"total_size\":{total}}},\"weight_map\":{{");
        for (i, (name, shard, _)) in listed.enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(text, "{comma}\"{name}\":\"{}\"", shard_name(*shard, self.shards)).unwrap();
        }
        text.push_str("}}");
        fs::write(self.index(), text).unwrap();
    }

    fn index(&self) -> PathBuf {
        self.dir.path().join("model.safetensors.index.json")
    }
}

fn shard_name(i: usize, of: usize) -> String {
    format!("model-{:05}-of-{of:05}.safetensors", i + 1)
}

fn write_shard(path: &Path, tensors: &[&Entry], packed: &BTreeMap<&str, &[u64]>) {
    let mut header = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    let mut at = 0;
    // Data to write: offset behind the header, and bytes.
    let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
    for (name, dtype, shape) in tensors {
        let end = at + bytes_of(dtype, shape);
        write!(
            header,
            ",\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{at},{end}]}}"
        )
        .unwrap();
        if let Some(matrix) = name.strip_suffix("_shape") {
            let [rows, words] = packed[matrix][..] else { panic!("`{name}`: no matrix") };
            let bytes = extents(dtype, [rows, 8 * words]);
            match runs.last_mut().filter(|(start, run)| start + run.len() as u64 == at) {
                Some((_, run)) => run.extend(bytes),
                None => runs.push((at, bytes)),
            }
        }
        at = end;
    }
    header.push('}');
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let start = 8 + header.len() as u64;
    let mut file = File::create_new(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(start + at).unwrap();
    for (at, bytes) in runs {
        file.write_all_at(&bytes, start + at).unwrap();
    }
}

/// The bytes of a `weight_shape` tensor.
fn extents(dtype: &str, extents: [u64; 2]) -> Vec<u8> {
    let i32s = || extents.iter().flat_map(|&n| i32::try_from(n).unwrap().to_le_bytes());
    match dtype {
        "I32" => i32s().collect(),
        "I64" => extents.iter().flat_map(|&n| n.to_le_bytes()).collect(),
        _ => panic!("a `weight_shape` in {dtype}"),
    }
}
