//! Helpers of the integration tests: golden checkpoints, engines over them, and reading tensors
//! from files and views.

#![allow(dead_code)]

pub mod mount;
pub mod toy;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mount_ckpt::{
    Checkpoint, Engine, EngineOptions, Ino, Mapping, Plan, PlanOptions, TensorId, View, ViewOptions,
};

/// dtype name, shape and bytes.
pub type Tensor = (String, Vec<usize>, Vec<u8>);

/// A folder of `tests/golden`.
pub fn golden(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(model)
}

/// The folders of `tests/golden` that hold a checkpoint.
pub const FAMILIES: [&str; 10] = [
    "deepseek-v3",
    "deepseek-v4-base",
    "deepseek-v4-flash",
    "glm4-moe",
    "gpt-oss",
    "kimi-k25-vl",
    "mimo-v2-flash",
    "minimax-m2",
    "qwen3-moe",
    "qwen3-vl-moe",
];

/// Exports a view with the built command. Returns its stderr if it fails.
pub fn exported(checkpoint: &Path, options: &[&str]) -> Result<tempfile::TempDir, String> {
    let out = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new(mount::BINARY);
    command.arg("export").args(options).arg(checkpoint).arg(out.path());
    let done = command.output().unwrap();
    let message = String::from_utf8_lossy(&done.stderr).into_owned();
    if done.status.success() { Ok(out) } else { Err(message) }
}

/// Output of `verify --json` of the built command for a view.
pub fn verified(checkpoint: &Path, options: &[&str]) -> serde_json::Value {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_mount-ckpt"));
    let done = command.args(["verify", "--json"]).args(options).arg(checkpoint).output().unwrap();
    serde_json::from_slice(&done.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&done.stderr)))
}

/// Copies the files of a directory without subdirectories. Creates the target directory if needed.
pub fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// config.json of a directory.
pub fn config_of(dir: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
}

/// config.json of an engine's view.
pub fn config_of_view(engine: Engine) -> serde_json::Value {
    let view = View::new(Arc::new(engine), &ViewOptions::default()).unwrap();
    serde_json::from_slice(&file_of_view(&view, "config.json")).unwrap()
}

/// A file in the root of a view.
pub fn file_of_view(view: &View, name: &str) -> Vec<u8> {
    let attr = view.lookup(Ino::ROOT, std::ffi::OsStr::new(name)).unwrap();
    let mut bytes = vec![0; usize::try_from(attr.size).unwrap()];
    assert_eq!(view.read(attr.ino, 0, &mut bytes).unwrap(), bytes.len());
    bytes
}

/// A directory's safetensors files, in the order of their names.
pub fn shards_of(dir: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut shards: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    shards.sort();
    shards
}

/// All tensors of a directory's safetensors files.
pub fn tensors_of_dir(dir: &Path) -> BTreeMap<String, Tensor> {
    shards_of(dir).iter().flat_map(|path| tensors_of(path)).collect()
}

/// All tensors of a safetensors file.
pub fn tensors_of(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| {
            let tensor =
                (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec());
            (name.to_owned(), tensor)
        })
        .collect()
}

/// Writes a checkpoint directory: a config.json and one shard.
pub fn write_checkpoint(dir: &Path, config: &str, tensors: &BTreeMap<String, Tensor>) {
    std::fs::write(dir.join("config.json"), config).unwrap();
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        let dtype = serde_json::from_value(serde_json::Value::from(dtype.as_str())).unwrap();
        let tensor = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap();
        (name, tensor)
    });
    let path = dir.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
}

/// The plan of a checkpoint's view, with the shipped mapping `model`.
pub fn plan(model: &str, dir: &Path, options: &PlanOptions) -> Result<Plan, String> {
    planned(&Mapping::named(model).unwrap(), dir, options).map(|(_, plan)| plan)
}

/// An engine over a checkpoint, with the shipped mapping `model`.
pub fn engine(model: &str, dir: &Path, options: &PlanOptions) -> Engine {
    engine_of(&Mapping::named(model).unwrap(), dir, options)
}

/// An engine over a checkpoint, with any mapping.
pub fn engine_of(mapping: &Mapping, dir: &Path, options: &PlanOptions) -> Engine {
    let engine = EngineOptions { cache_bytes: 64 << 20, direct_io: false, threads: 2 };
    open(mapping, dir, options, engine).unwrap_or_else(|e| panic!("{e}"))
}

/// As [`engine_of`], with engine options. Returns the message if the checkpoint is refused.
pub fn open(
    mapping: &Mapping,
    dir: &Path,
    options: &PlanOptions,
    engine: EngineOptions,
) -> Result<Engine, String> {
    let (checkpoint, plan) = planned(mapping, dir, options)?;
    Ok(Engine::new(checkpoint, Arc::new(plan), engine))
}

fn planned(
    mapping: &Mapping,
    dir: &Path,
    options: &PlanOptions,
) -> Result<(Arc<Checkpoint>, Plan), String> {
    let checkpoint = Arc::new(Checkpoint::open(dir).map_err(|e| e.to_string())?);
    let plan = Plan::build(&checkpoint, mapping, options).map_err(|e| e.to_string())?;
    Ok((checkpoint, plan))
}

/// All tensors of the view's root directory, each read in one call.
pub fn tensors_of_engine(engine: &Engine) -> BTreeMap<String, Tensor> {
    let read = |id: &TensorId| {
        let t = engine.plan().tensor(*id);
        let mut bytes = vec![0; usize::try_from(t.bytes()).unwrap()];
        engine.read(*id, 0, &mut bytes).unwrap();
        let shape = t.shape.dims().iter().map(|&d| usize::try_from(d).unwrap()).collect();
        let dtype: safetensors::Dtype =
            serde_json::from_value(serde_json::Value::from(t.dtype.name())).unwrap();
        (t.name.to_string(), (format!("{dtype:?}"), shape, bytes))
    };
    engine.plan().directories[0].tensors.iter().map(read).collect()
}

/// The value of an E4M3 code (OCP FP8: no infinities, `S.1111.111` is NaN).
pub fn e4m3_to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Inverse of `format!("{dtype:?}")`, which the dtype of a [`Tensor`] is.
pub fn dtype_of(name: &str) -> safetensors::Dtype {
    let known = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "F8_E4M3", "F8_E8M0"];
    let parse = |n: &&str| serde_json::from_value(serde_json::Value::from(*n)).unwrap();
    let mut dtypes = known.iter().map(parse);
    dtypes.find(|d: &safetensors::Dtype| format!("{d:?}") == name).unwrap()
}

/// Whether [`assert_same`] distinguishes +0.0 from -0.0.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Zeros {
    Signed,
    Equal,
}

/// Panics at the first difference in names, dtypes, shapes or bits. Any NaN equals any NaN.
pub fn assert_same(
    got: &BTreeMap<String, Tensor>,
    expected: &BTreeMap<String, Tensor>,
    zeros: Zeros,
) {
    let names = |m: &BTreeMap<String, Tensor>| m.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(got), names(expected));
    for (name, (dtype, shape, bytes)) in expected {
        let (got_dtype, got_shape, got_bytes) = &got[name];
        assert_eq!((got_dtype, got_shape), (dtype, shape), "{name}");
        assert_eq!(got_bytes.len(), bytes.len(), "{name}");
        // Comparing element by element takes a hundred times as long.
        if got_bytes == bytes {
            continue;
        }
        let width = match dtype.as_str() {
            "BF16" | "F16" => 2,
            "F32" => 4,
            _ => 1,
        };
        let canonical = |b: &[u8]| -> u32 {
            let bits = match b {
                [a] => return u32::from(*a),
                [a, b] => u32::from(u16::from_le_bytes([*a, *b])),
                [a, b, c, d] => u32::from_le_bytes([*a, *b, *c, *d]),
                _ => unreachable!("widths are 1, 2 and 4"),
            };
            let (exponent, sign) = match dtype.as_str() {
                "BF16" => (0x7F80, 0x8000),
                "F16" => (0x7C00, 0x8000),
                _ => (0x7F80_0000, 0x8000_0000),
            };
            if bits & (sign - 1) > exponent {
                return exponent + 1;
            }
            if zeros == Zeros::Equal && bits == sign { 0 } else { bits }
        };
        let pairs = got_bytes.chunks(width).zip(bytes.chunks(width)).enumerate();
        for (i, (g, e)) in pairs {
            assert_eq!(canonical(g), canonical(e), "`{name}` differs at element {i} of {shape:?}");
        }
    }
}
