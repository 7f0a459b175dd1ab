//! Published releases from `tests/releases/NAME`, and the tensors in their tables.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use mount_ckpt::{Checkpoint, DType, Mapping, Plan, PlanOptions};
use serde_json::Value;

use crate::sparse::Sparse;
use crate::table::table;

/// Name, dtype and shape.
pub type Entry = (String, String, Vec<u64>);

/// dtype and shape of each tensor, by name.
pub type Tensors = BTreeMap<String, (String, Vec<u64>)>;

/// Bytes of a tensor.
pub fn bytes_of(dtype: &str, shape: &[u64]) -> u64 {
    let bits = DType::parse(dtype).unwrap_or_else(|| panic!("no dtype `{dtype}`")).bits();
    shape.iter().product::<u64>() * u64::from(bits) / 8
}

/// Bytes of all tensors.
pub fn total_bytes(tensors: &Tensors) -> u64 {
    tensors.values().map(|(dtype, shape)| bytes_of(dtype, shape)).sum()
}

/// A folder of `tests/releases`.
pub struct Release {
    pub name: &'static str,
    /// In the order of the table.
    pub entries: Vec<Entry>,
    /// Name and content of config.json and the other JSON files.
    pub files: Vec<(String, Vec<u8>)>,
}

impl Release {
    pub fn read(name: &'static str) -> Release {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/releases").join(name);
        let files = fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let files = files.map(|file| file.unwrap());
        let is_sidecar = |file: &fs::DirEntry| file.path().extension().is_some_and(|e| e == "json");
        let files = files
            .filter(is_sidecar)
            .map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap()));
        Release { name, entries: table(&dir), files: files.collect() }
    }

    pub fn tensors(&self) -> Tensors {
        let entries = self.entries.iter().cloned();
        let tensors: Tensors = entries.map(|(name, dtype, shape)| (name, (dtype, shape))).collect();
        assert_eq!(tensors.len(), self.entries.len(), "{}: a tensor is there twice", self.name);
        tensors
    }

    pub fn config(&self) -> Value {
        let (_, text) = self.files.iter().find(|(name, _)| name == "config.json").unwrap();
        serde_json::from_slice(text).unwrap()
    }

    pub fn write(&self) -> Sparse {
        Sparse::write(&self.entries, &self.files)
    }
}

/// The plan of a checkpoint's view, with the mapping for the `model_type` in config.json.
pub fn plan(dir: &Path, options: &PlanOptions) -> Result<(Arc<Checkpoint>, Plan), String> {
    let checkpoint = Arc::new(Checkpoint::open(dir).map_err(|e| e.to_string())?);
    let types = checkpoint.config().model_types();
    let mapping = Mapping::for_model_types(&types).map_err(|e| e.to_string())?;
    let plan = Plan::build(&checkpoint, &mapping, options).map_err(|e| e.to_string())?;
    Ok((checkpoint, plan))
}

/// A release's logical tensors: payload, scale and shape tensors combined into the matrices that
/// they encode.
pub struct LogicalTensors {
    /// Quantized tensors as BF16 matrices, all others unchanged.
    pub tensors: Tensors,
    /// For each logical tensor, the stored tensor with its payload or plain values.
    pub payloads: BTreeMap<String, String>,
    /// For each scale and shape tensor, the matrix it belongs to.
    pub parts: BTreeMap<String, String>,
}

impl LogicalTensors {
    /// The logical tensor that a stored tensor belongs to.
    pub fn matrix_of<'a>(&'a self, stored: &'a str) -> &'a str {
        let of_part = self.parts.get(stored).map(String::as_str);
        of_part
            .or_else(|| stored.strip_suffix("_packed"))
            .or_else(|| stored.strip_suffix("_blocks"))
            .unwrap_or(stored)
    }
}

/// Combines the stored tensors of a release into logical tensors.
pub fn logical_tensors(stored: &Tensors) -> LogicalTensors {
    let mut out = LogicalTensors {
        tensors: Tensors::new(),
        payloads: BTreeMap::new(),
        parts: BTreeMap::new(),
    };
    for (name, (dtype, shape)) in stored {
        let mut shape = shape.clone();
        let last = shape.len().saturating_sub(1);
        let module = name.strip_suffix("weight").unwrap_or(name);
        // The name of the matrix, and possible names of its scale.
        let (matrix, scales) = match dtype.as_str() {
            "I32" if name.ends_with("_packed") => {
                shape[last] *= 8;
                let matrix = name.strip_suffix("_packed").unwrap();
                out.parts.insert(format!("{matrix}_shape"), matrix.to_owned());
                (matrix, vec![format!("{matrix}_scale")])
            }
            "U8" if name.ends_with("_blocks") => {
                let matrix = name.strip_suffix("_blocks").unwrap();
                let [experts, rows, blocks, bytes] = shape[..] else { panic!("`{name}`") };
                shape = vec![experts, 2 * blocks * bytes, rows];
                (matrix, vec![format!("{matrix}_scales")])
            }
            "F8_E4M3" | "I8" => {
                if dtype == "I8" {
                    shape[last] *= 2;
                }
                let ends = ["_scale_inv", "_scale"].map(|end| format!("{name}{end}"));
                (name.as_str(), [&ends[..], &[format!("{module}scale")]].concat())
            }
            _ => {
                out.tensors.insert(name.clone(), (dtype.clone(), shape));
                out.payloads.insert(name.clone(), name.clone());
                continue;
            }
        };
        let scale = scales.into_iter().find(|scale| stored.contains_key(scale));
        let scale = scale.unwrap_or_else(|| panic!("`{name}` has no scale"));
        out.parts.insert(scale, matrix.to_owned());
        out.payloads.insert(matrix.to_owned(), name.clone());
        out.tensors.insert(matrix.to_owned(), ("BF16".to_owned(), shape));
    }
    for part in out.parts.keys() {
        out.tensors.remove(part);
        out.payloads.remove(part);
    }
    out
}
