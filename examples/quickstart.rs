//! Writes a small checkpoint in the form of MiMo-V2-Flash, mounts it, and checks every byte that it
//! reads from the mount.
//!
//! ```text
//! cargo run --release --example quickstart
//! cargo run --release --example quickstart -- write DIR    # writes the checkpoint, mounts nothing
//! ```
//! The function [`mount`] shows the use of the library, from a directory to a mount. The expected
//! values are computed from the bytes that were written, element by element and without the
//! library's codec ([`Written::decoded`], [`Written::decoded_kv`]).

#[path = "quickstart/checkpoint.rs"]
mod checkpoint;

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use checkpoint::{
    EXPERTS, HIDDEN, INTERMEDIATE, K_DIM, KV_HEADS, LAYERS, SLIDING, TOKENIZER, V_DIM, Written,
};
use half::bf16;
use mount_ckpt::{
    Checkpoint, Engine, EngineOptions, Mapping, MountOptions, Mounted, Plan, PlanOptions, View,
    ViewOptions,
};
use safetensors::{Dtype, SafeTensors};

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let result = match arguments.as_slice() {
        [] => run(),
        [word, directory] if word == "write" => write(Path::new(directory)),
        _ => Err(anyhow::anyhow!("expected no arguments, or `write DIR`")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quickstart: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Writes the checkpoint to `directory` and mounts nothing.
fn write(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)?;
    Written::model().save(directory)
}

fn run() -> Result<()> {
    let temporary = tempfile::tempdir().context("no temporary directory")?;
    let (source, at) = (temporary.path().join("checkpoint"), temporary.path().join("mnt"));
    fs::create_dir(&source)?;
    fs::create_dir(&at)?;

    let written = Written::model();
    written.save(&source)?;
    println!("checkpoint, as published:");
    list(&source)?;

    // `mounted` is dropped before `temporary`, so an error below also unmounts before the directory
    // is removed.
    let mounted = mount(&source, &at)?;
    println!("\nview, in NeMo Automodel's native layout:");
    list(&at)?;
    println!();
    check(&at, &written)?;

    let stats: serde_json::Value =
        serde_json::from_slice(&fs::read(at.join(".mount-ckpt/stats.json"))?)?;
    println!("\ncounters of the mount:");
    for (name, value) in stats["engine"].as_object().context("no counters")? {
        println!("{:>12} {name}", value.to_string());
    }
    mounted.unmount()?;
    mounted.wait()?;
    println!("\nunmounted; every element was as expected");
    Ok(())
}

/// Mounts a view of the checkpoint in `source`, as `mount-ckpt SRC MNT` does.
fn mount(source: &Path, at: &Path) -> Result<Mounted> {
    // Reads config.json, the index and the header of every shard, but no tensor data.
    let checkpoint = Arc::new(Checkpoint::open(source)?);
    // Selects the built-in mapping for the `model_type` in config.json, as `--model auto` does.
    let mapping = Mapping::for_model_types(&checkpoint.config().model_types())?;
    // Decides where each byte of every tensor of the view comes from. A checkpoint that does not
    // fit is refused here.
    let plan = Arc::new(Plan::build(&checkpoint, &mapping, &PlanOptions::default())?);
    println!("\n{}", plan.summary);
    // The engine reads and decodes tensors when they are read from the mount.
    let options = EngineOptions { cache_bytes: 64 << 20, threads: 2, ..EngineOptions::default() };
    let engine = Arc::new(Engine::new(checkpoint, plan, options));
    // The view arranges the tensors in safetensors files.
    let shards = ViewOptions { shard_size: 4_000_000, ..ViewOptions::default() };
    let view = Arc::new(View::new(engine, &shards)?);
    Ok(mount_ckpt::mount(view, at, &MountOptions::default())?)
}

/// Prints a directory as `ls -l` does, without owners and times.
fn list(directory: &Path) -> Result<()> {
    let mut entries = fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let meta = entry.metadata()?;
        let mode = meta.permissions().mode();
        let kind = if meta.is_dir() { 'd' } else { '-' };
        let bit = |i: u32, c: char| if mode >> i & 1 == 1 { c } else { '-' };
        let bits: String = (0..9).rev().zip("rwxrwxrwx".chars()).map(|(i, c)| bit(i, c)).collect();
        println!("{kind}{bits} {:>10} {}", meta.len(), entry.file_name().display());
    }
    Ok(())
}

/// Compares the view at `at` with the checkpoint that was written.
fn check(at: &Path, written: &Written) -> Result<()> {
    let config: serde_json::Value = serde_json::from_slice(&fs::read(at.join("config.json"))?)?;
    ensure!(
        config.get("quantization_config").is_none(),
        "config.json of the view still has a `quantization_config`"
    );
    let tokenizer = fs::read(at.join("tokenizer.json"))?;
    ensure!(tokenizer == TOKENIZER.as_bytes(), "`tokenizer.json` differs");

    for layer in 1..LAYERS {
        let experts = format!("model.layers.{layer}.mlp.experts");
        let (wide, expert) = (2 * INTERMEDIATE, HIDDEN * 2 * INTERMEDIATE);
        // [expert, hidden, 2 * intermediate]: gate and up of each expert, transposed, gate first.
        let gate_and_up = |i: usize| {
            let (e, row, column) = (i / expert, i % expert / wide, i % wide);
            let name = if column < INTERMEDIATE { "gate_proj" } else { "up_proj" };
            written.decoded(&format!("{experts}.{e}.{name}"), column % INTERMEDIATE, row)
        };
        let name = format!("{experts}.gate_and_up_projs");
        compare(at, &name, &[EXPERTS, HIDDEN, wide], gate_and_up)?;
        // [expert, intermediate, hidden]: down of each expert, transposed.
        let down = |i: usize| {
            let (e, row) = (i / (INTERMEDIATE * HIDDEN), i / HIDDEN % INTERMEDIATE);
            written.decoded(&format!("{experts}.{e}.down_proj"), i % HIDDEN, row)
        };
        compare(at, &format!("{experts}.down_projs"), &[EXPERTS, INTERMEDIATE, HIDDEN], down)?;
    }
    for (layer, sliding) in SLIDING.into_iter().enumerate() {
        let heads = if sliding { 2 * KV_HEADS } else { KV_HEADS };
        let layer = format!("layers.{layer}");
        for (projection, rows) in [("k_proj", heads * K_DIM), ("v_proj", heads * V_DIM)] {
            let name = format!("model.{layer}.self_attn.{projection}.weight");
            let value =
                |i: usize| written.decoded_kv(&layer, heads, projection, i / HIDDEN, i % HIDDEN);
            compare(at, &name, &[rows, HIDDEN], value)?;
        }
    }
    // Tensors that are not quantized keep their dtype and their bytes.
    for name in
        ["model.layers.1.mlp.gate.weight", "model.layers.2.mlp.gate.e_score_correction_bias"]
    {
        let (dtype, _, bytes) = read(at, name)?;
        ensure!(dtype == Dtype::F32 && bytes == written.tensors[name].bytes, "`{name}` differs");
        println!("every byte as published:     {name}");
    }
    Ok(())
}

/// Compares each element of a BF16 tensor of the view with `expected`, bit for bit.
fn compare(at: &Path, name: &str, shape: &[usize], expected: impl Fn(usize) -> f32) -> Result<()> {
    let (dtype, got_shape, bytes) = read(at, name)?;
    ensure!(dtype == Dtype::BF16, "`{name}`: expected BF16, got {dtype:?}");
    ensure!(got_shape == shape, "`{name}`: expected shape {shape:?}, got {got_shape:?}");
    for (i, got) in bytes.chunks_exact(2).enumerate() {
        let got = bf16::from_le_bytes([got[0], got[1]]);
        let expected = bf16::from_f32(expected(i));
        let same = got.to_bits() == expected.to_bits();
        ensure!(same, "`{name}`, element {i}: expected {expected}, got {got}");
    }
    println!("{:>9} elements compared: {name} {shape:?}", bytes.len() / 2);
    Ok(())
}

/// Reads a tensor from a checkpoint directory. The index names its shard, whose header has the
/// dtype, the shape and the offset.
fn read(directory: &Path, name: &str) -> Result<(Dtype, Vec<usize>, Vec<u8>)> {
    let index = fs::read(directory.join("model.safetensors.index.json"))?;
    let index: serde_json::Value = serde_json::from_slice(&index)?;
    let shard = index["weight_map"][name].as_str();
    let shard = fs::read(directory.join(shard.with_context(|| format!("`{name}` is not there"))?))?;
    let shard = SafeTensors::deserialize(&shard)?;
    let tensor = shard.tensor(name)?;
    Ok((tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec()))
}
