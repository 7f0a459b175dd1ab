//! A golden checkpoint in memory that a test can change and write to disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mount_ckpt::{Engine, EngineOptions, LayoutName, Mapping, PlanOptions};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::{dtype_of, golden, open, tensors_of, tensors_of_engine};

/// A tensor of a [`Toy`].
#[derive(Clone, Debug)]
pub struct ToyTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
    pub shard: usize,
}

/// A checkpoint that can be changed. In the names that its methods take, and in messages, `~`
/// stands for the prefix of the experts of one layer, such as `model.layers.1.mlp.experts`.
#[derive(Clone, Debug)]
pub struct Toy {
    pub model: &'static str,
    experts: &'static str,
    pub config: Value,
    pub tensors: BTreeMap<String, ToyTensor>,
}

/// File name of a shard.
pub fn shard_name(shard: usize) -> String {
    format!("model-{:05}-of-00003.safetensors", shard + 1)
}

fn bytes_of(dtype: Dtype, shape: &[usize]) -> usize {
    (shape.iter().product::<usize>() * dtype.bitsize()).div_ceil(8)
}

impl Toy {
    /// The checkpoint of a golden folder.
    pub fn golden(family: &'static str) -> Toy {
        let dir = golden(family).join("checkpoint");
        let mut tensors = BTreeMap::new();
        for shard in 0..3 {
            let bytes = fs::read(dir.join(shard_name(shard))).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            for (name, view) in file.iter() {
                let tensor = ToyTensor {
                    dtype: view.dtype(),
                    shape: view.shape().to_vec(),
                    bytes: view.data().to_vec(),
                    shard,
                };
                tensors.insert(name.to_owned(), tensor);
            }
        }
        let config = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        let (model, experts) = match family {
            "mimo-v2-flash" => (family, "model.layers.1.mlp.experts"),
            "deepseek-v4-flash" | "deepseek-v4-base" => ("deepseek-v4", "layers.1.ffn.experts"),
            "kimi-k25-vl" => (family, "language_model.model.layers.1.mlp.experts"),
            "qwen3-vl-moe" => (family, "model.language_model.layers.1.mlp.experts"),
            "deepseek-v3" | "glm4-moe" | "gpt-oss" | "qwen3-moe" => {
                (family, "model.layers.1.mlp.experts")
            }
            "minimax-m2" => (family, "model.layers.1.block_sparse_moe.experts"),
            _ => panic!("no toy of `{family}`"),
        };
        Toy { model, experts, config, tensors }
    }

    /// The native layout of a golden folder, in one shard.
    pub fn native(family: &'static str) -> Toy {
        let mut toy = Toy::golden(family);
        toy.tensors = tensors_of(&golden(family).join("native.safetensors"))
            .into_iter()
            .map(|(name, (dtype, shape, bytes))| {
                (name, ToyTensor { dtype: dtype_of(&dtype), shape, bytes, shard: 0 })
            })
            .collect();
        toy
    }

    /// A golden folder's checkpoint in any layout. Layouts other than the published one are in one
    /// shard.
    pub fn in_layout(family: &'static str, layout: LayoutName) -> Toy {
        let mut toy = Toy::golden(family);
        if layout == LayoutName::Hf {
            return toy;
        }
        let options = PlanOptions { to: Some(layout), ..PlanOptions::default() };
        let mounted = toy.mount(&options, |_| {}).unwrap_or_else(|e| panic!("{family}: {e}"));
        toy.tensors = tensors_of_engine(&mounted.engine)
            .into_iter()
            .map(|(name, (dtype, shape, bytes))| {
                (name, ToyTensor { dtype: dtype_of(&dtype), shape, bytes, shard: 0 })
            })
            .collect();
        toy
    }

    /// The name with `~` replaced.
    pub fn full_name(&self, name: &str) -> String {
        name.replace('~', self.experts)
    }

    pub fn tensor(&mut self, name: &str) -> &mut ToyTensor {
        let name = self.full_name(name);
        self.tensors.get_mut(&name).unwrap_or_else(|| panic!("the toy has no `{name}`"))
    }

    pub fn drop(&mut self, name: &str) -> &mut Toy {
        let name = self.full_name(name);
        self.tensors.remove(&name).unwrap_or_else(|| panic!("the toy has no `{name}`"));
        self
    }

    /// Applies `change` to every tensor whose name contains `part`.
    pub fn each(
        &mut self,
        part: &str,
        change: impl for<'a> Fn(&'a mut Toy, &str) -> &'a mut Toy,
    ) -> &mut Toy {
        let part = self.full_name(part);
        let names: Vec<String> =
            self.tensors.keys().filter(|n| n.contains(&part)).cloned().collect();
        assert!(!names.is_empty(), "the toy has no `{part}`");
        for name in names {
            change(self, &name);
        }
        self
    }

    /// Drops every tensor whose name contains `part`.
    pub fn drop_all(&mut self, part: &str) -> &mut Toy {
        self.each(part, |toy, name| toy.drop(name))
    }

    pub fn rename(&mut self, from: &str, to: &str) -> &mut Toy {
        self.copy(from, to).drop(from)
    }

    /// Replaces `from` with `to` in every name.
    pub fn rename_all(&mut self, from: &str, to: &str) -> &mut Toy {
        let (from, to) = (self.full_name(from), self.full_name(to));
        let tensors = std::mem::take(&mut self.tensors).into_iter();
        self.tensors = tensors.map(|(name, t)| (name.replace(&from, &to), t)).collect();
        self
    }

    pub fn copy(&mut self, from: &str, to: &str) -> &mut Toy {
        let (tensor, to) = (self.tensor(from).clone(), self.full_name(to));
        assert!(self.tensors.insert(to.clone(), tensor).is_none(), "the toy has `{to}`");
        self
    }

    /// Adds a tensor of zeros.
    pub fn add(&mut self, name: &str, dtype: Dtype, shape: &[usize]) -> &mut Toy {
        let (bytes, shape) = (vec![0; bytes_of(dtype, shape)], shape.to_vec());
        let tensor = ToyTensor { dtype, shape, bytes, shard: 0 };
        self.tensors.insert(self.full_name(name), tensor);
        self
    }

    /// Changes the shape. The bytes are truncated, or extended with zeros.
    pub fn reshape(&mut self, name: &str, shape: &[usize]) -> &mut Toy {
        let dtype = self.tensor(name).dtype;
        self.retype_as(name, dtype, shape)
    }

    /// Changes the dtype. The bytes are truncated, or extended with zeros.
    pub fn retype(&mut self, name: &str, dtype: Dtype) -> &mut Toy {
        let shape = self.tensor(name).shape.clone();
        self.retype_as(name, dtype, &shape)
    }

    pub fn retype_as(&mut self, name: &str, dtype: Dtype, shape: &[usize]) -> &mut Toy {
        let tensor = self.tensor(name);
        tensor.dtype = dtype;
        tensor.shape = shape.to_vec();
        tensor.bytes.resize(bytes_of(dtype, shape), 0);
        self
    }

    pub fn move_to(&mut self, name: &str, shard: usize) -> &mut Toy {
        self.tensor(name).shard = shard;
        self
    }

    /// Sets a value of config.json at a dotted key.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Toy {
        *self.config_at(key) = value.into();
        self
    }

    /// Replaces config.json.
    pub fn configure(&mut self, config: Value) -> &mut Toy {
        self.config = config;
        self
    }

    pub fn unset(&mut self, key: &str) -> &mut Toy {
        *self.config_at(key) = Value::Null;
        self
    }

    fn config_at(&mut self, key: &str) -> &mut Value {
        key.split('.').fold(&mut self.config, |value, part| &mut value[part])
    }

    /// Writes config.json, three shards and their index.
    pub fn write(&self, dir: &Path) {
        let config = serde_json::to_vec_pretty(&self.config).unwrap();
        fs::write(dir.join("config.json"), config).unwrap();
        let mut map = serde_json::Map::new();
        for shard in 0..3 {
            let views = self.tensors.iter().filter(|(_, t)| t.shard == shard).map(|(name, t)| {
                let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes);
                (name, view.unwrap_or_else(|e| panic!("`{name}`: {e}")))
            });
            let file = safetensors::serialize(views, None).unwrap();
            fs::write(dir.join(shard_name(shard)), file).unwrap();
        }
        for (name, t) in &self.tensors {
            map.insert(name.clone(), shard_name(t.shard).into());
        }
        let index = json!({ "metadata": {}, "weight_map": map });
        let index = serde_json::to_vec(&index).unwrap();
        fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    }

    /// Writes the checkpoint, applies `damage` to the files, and opens an engine. If the checkpoint
    /// is refused, returns the message, with the directory shown as `CKPT`.
    pub fn mount(
        &self,
        options: &PlanOptions,
        damage: impl FnOnce(&Path),
    ) -> Result<Mounted, String> {
        let dir = tempfile::tempdir().unwrap();
        self.write(dir.path());
        damage(dir.path());
        let mapping = Mapping::named(self.model).unwrap();
        let engine = EngineOptions { cache_bytes: 64 << 20, direct_io: true, threads: 2 };
        let opened = open(&mapping, dir.path(), options, engine);
        let shown = fs::canonicalize(dir.path()).unwrap().display().to_string();
        match opened {
            Ok(engine) => Ok(Mounted { engine, _dir: dir }),
            Err(message) => Err(message.replace(&shown, "CKPT").replace(self.experts, "~")),
        }
    }
}

/// An engine over a changed checkpoint. Dropping this value deletes the directory.
pub struct Mounted {
    pub engine: Engine,
    _dir: tempfile::TempDir,
}
