//! Writes the checkpoints that are measured: one layer of experts of real tensor sizes for each
//! family, with random codes and scales; and one as large as Kimi K2.5 in sparse files, without
//! data.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// A file of 512 MiB in MiMo's checkpoint that is not a shard, so that a view passes it through.
pub const HOST_FILE: &str = "tokenizer.json";

/// A model family of which a checkpoint is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// FP8 with F32 scales of 128x128 blocks; hidden 4096, intermediate 2048.
    Mimo,
    /// FP4 with E8M0 scales of 32 columns; hidden 4096, intermediate 2048.
    DeepSeek,
    /// INT4 with BF16 scales of 32 columns; hidden 7168, intermediate 2048.
    Kimi,
    /// BF16, stacked as in the view, so that all tensors are verbatim; hidden 4096, intermediate
    /// 1536.
    Qwen,
}

impl Family {
    pub const ALL: [Family; 4] = [Family::Mimo, Family::DeepSeek, Family::Kimi, Family::Qwen];

    /// The name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Family::Mimo => "MiMo-V2-Flash, FP8",
            Family::DeepSeek => "DeepSeek V4 Flash, FP4",
            Family::Kimi => "Kimi K2.5, INT4",
            Family::Qwen => "Qwen3-VL-MoE, verbatim",
        }
    }

    /// Number of experts: as many as fit in 2 GiB as BF16.
    pub fn experts(self) -> u64 {
        match self {
            Family::Mimo | Family::DeepSeek => 42,
            Family::Kimi => 24,
            Family::Qwen => 56,
        }
    }

    /// Bytes of the payloads of an expert in the checkpoint, without scales.
    pub fn stored_expert_bytes(self) -> u64 {
        let elements = 3 * 2048 * 4096;
        match self {
            Family::Mimo => elements,
            Family::DeepSeek => elements / 2,
            Family::Kimi => 3 * 2048 * 7168 / 2,
            Family::Qwen => 2 * 3 * 1536 * 4096,
        }
    }

    fn directory(self) -> &'static str {
        match self {
            Family::Mimo => "mimo",
            Family::DeepSeek => "deepseek",
            Family::Kimi => "kimi",
            Family::Qwen => "qwen",
        }
    }

    fn config(self) -> Value {
        let experts = self.experts();
        match self {
            Family::Mimo => json!({
                "model_type": "mimo_v2_flash", "num_hidden_layers": 1, "hidden_size": 4096,
                "num_key_value_heads": 4, "moe_intermediate_size": 2048, "n_routed_experts": experts,
                "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
            }),
            Family::DeepSeek => json!({
                "model_type": "deepseek_v4", "num_hidden_layers": 1, "hidden_size": 4096,
                "moe_intermediate_size": 2048, "n_routed_experts": experts, "expert_dtype": "fp4",
                "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
            }),
            Family::Kimi => json!({
                "model_type": "kimi_k25",
                "text_config": {
                    "model_type": "kimi_k2", "num_hidden_layers": 1, "hidden_size": 7168,
                    "moe_intermediate_size": 2048, "n_routed_experts": experts,
                },
            }),
            Family::Qwen => json!({
                "model_type": "qwen3_vl_moe",
                "text_config": {
                    "model_type": "qwen3_vl_moe_text", "num_hidden_layers": 1,
                    "hidden_size": 4096, "moe_intermediate_size": 1536, "num_experts": experts,
                },
            }),
        }
    }

    fn tensors(self) -> Vec<Tensor> {
        let mut tensors = Vec::new();
        for e in 0..self.experts() {
            match self {
                Family::Mimo => {
                    for (part, [rows, cols]) in parts(["gate_proj", "up_proj", "down_proj"], 4096) {
                        let name = format!("model.layers.0.mlp.experts.{e}.{part}.weight");
                        let scale = format!("{name}_scale_inv");
                        tensors.push(Tensor::new(name, Kind::Fp8, [rows, cols]));
                        tensors.push(Tensor::new(scale, Kind::F32, [rows / 128, cols / 128]));
                    }
                }
                Family::DeepSeek => {
                    for (part, [rows, cols]) in parts(["w1", "w3", "w2"], 4096) {
                        let name = format!("layers.0.ffn.experts.{e}.{part}");
                        let payload = format!("{name}.weight");
                        tensors.push(Tensor::new(payload, Kind::Fp4, [rows, cols / 2]));
                        let scale = format!("{name}.scale");
                        tensors.push(Tensor::new(scale, Kind::E8m0, [rows, cols / 32]));
                    }
                }
                Family::Kimi => tensors.extend(kimi_expert(0, e)),
                Family::Qwen => {}
            }
        }
        let norm = match self {
            Family::Mimo => "model.norm.weight",
            Family::DeepSeek => "norm.weight",
            Family::Kimi => "language_model.model.norm.weight",
            Family::Qwen => {
                let name = |part| format!("model.language_model.layers.0.mlp.experts.{part}");
                let e = self.experts();
                tensors.push(Tensor::new(name("gate_up_proj"), Kind::Bf16, [e, 4096, 2 * 1536]));
                tensors.push(Tensor::new(name("down_proj"), Kind::Bf16, [e, 1536, 4096]));
                "model.language_model.norm.weight"
            }
        };
        let hidden = if self == Family::Kimi { 7168 } else { 4096 };
        tensors.push(Tensor::new(norm.to_owned(), Kind::Bf16, [hidden]));
        tensors
    }

    /// The directory of the family's checkpoint below `data`. It is written if it does not exist.
    pub fn checkpoint(self, data: &Path) -> Result<PathBuf> {
        let directory = data.join(self.directory());
        // config.json is written last, so a checkpoint without it is incomplete and is written
        // again.
        let config = directory.join("config.json");
        if !config.exists() {
            eprintln!("writing {}: {}", directory.display(), self.name());
            fs::create_dir_all(&directory)?;
            write_shard(&directory.join("model.safetensors"), &self.tensors(), Content::Random)?;
            if self == Family::Mimo {
                // A file that the view passes through.
                let tokenizer = Tensor::new("tokenizer".to_owned(), Kind::Bf16, [1 << 28]);
                let mut file = BufWriter::new(File::create(directory.join(HOST_FILE))?);
                tokenizer.write(&mut file, 1)?;
                file.flush()?;
            }
            fs::write(&config, serde_json::to_vec(&self.config())?)?;
        }
        Ok(directory)
    }
}

/// Gate, up (`[2048, hidden]`) and down (`[hidden, 2048]`) of an expert.
fn parts(names: [&str; 3], hidden: u64) -> [(&str, [u64; 2]); 3] {
    let [gate, up, down] = names;
    [(gate, [2048, hidden]), (up, [2048, hidden]), (down, [hidden, 2048])]
}

fn kimi_expert(layer: u64, expert: u64) -> Vec<Tensor> {
    let of = |(part, [rows, cols]): (&str, [u64; 2])| {
        let name =
            format!("language_model.model.layers.{layer}.mlp.experts.{expert}.{part}.weight");
        let shape = [rows, cols].map(|n| u32::try_from(n).expect("thousands"));
        [
            Tensor::new(format!("{name}_packed"), Kind::Int4, [rows, cols / 8]),
            Tensor::new(format!("{name}_scale"), Kind::Bf16, [rows, cols / 32]),
            Tensor::new(format!("{name}_shape"), Kind::WeightShape(shape), [2]),
        ]
    };
    parts(["gate_proj", "up_proj", "down_proj"], 7168).into_iter().flat_map(of).collect()
}

/// Number of layers of Kimi K2.5. The first is dense.
const LAYERS: u64 = 61;
/// Number of its routed experts.
const EXPERTS: u64 = 384;
/// Number of its shards.
const SHARDS: usize = 64;

/// The directory of a checkpoint below `data` with the tensors of Kimi K2.5 at their true size, in
/// sparse files without data. It is written if it does not exist.
pub fn sparse_kimi(data: &Path) -> Result<PathBuf> {
    let directory = data.join("kimi-sparse");
    let config = directory.join("config.json");
    if config.exists() {
        return Ok(directory);
    }
    eprintln!("writing {}: {SHARDS} sparse shards", directory.display());
    fs::create_dir_all(&directory)?;
    let tensors = sparse_tensors();
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(SHARDS)).enumerate() {
        let name = format!("model-{:05}-of-{SHARDS:05}.safetensors", i + 1);
        write_shard(&directory.join(&name), part, Content::Hole)?;
        map.extend(part.iter().map(|t| (t.name.clone(), json!(name))));
    }
    let index = serde_json::to_vec(&json!({"metadata": {}, "weight_map": map}))?;
    fs::write(directory.join("model.safetensors.index.json"), index)?;
    let text = json!({
        "model_type": "kimi_k2", "num_hidden_layers": LAYERS, "n_routed_experts": EXPERTS,
        "hidden_size": 7168, "moe_intermediate_size": 2048, "first_k_dense_replace": 1,
    });
    let whole = json!({"model_type": "kimi_k25", "text_config": text});
    fs::write(&config, serde_json::to_vec(&whole)?)?;
    Ok(directory)
}

fn sparse_tensors() -> Vec<Tensor> {
    const HIDDEN: u64 = 7168;
    let mut tensors = Vec::new();
    let mut plain = |name: String, shape: &[u64]| {
        tensors.push(Tensor { name, kind: Kind::Bf16, shape: shape.to_vec() });
    };
    plain("language_model.model.embed_tokens.weight".to_owned(), &[163_840, HIDDEN]);
    plain("language_model.lm_head.weight".to_owned(), &[163_840, HIDDEN]);
    plain("language_model.model.norm.weight".to_owned(), &[HIDDEN]);
    for layer in 0..LAYERS {
        let mut in_layer = |name: &str, shape: &[u64]| {
            plain(format!("language_model.model.layers.{layer}.{name}.weight"), shape);
        };
        in_layer("input_layernorm", &[HIDDEN]);
        in_layer("post_attention_layernorm", &[HIDDEN]);
        in_layer("self_attn.q_a_proj", &[1536, HIDDEN]);
        in_layer("self_attn.q_b_proj", &[12_288, 1536]);
        in_layer("self_attn.kv_a_proj_with_mqa", &[576, HIDDEN]);
        in_layer("self_attn.kv_b_proj", &[16_384, 512]);
        in_layer("self_attn.o_proj", &[HIDDEN, 8192]);
        in_layer("self_attn.q_a_layernorm", &[1536]);
        in_layer("self_attn.kv_a_layernorm", &[512]);
        let (mlp, wide) = if layer == 0 { ("mlp", 18_432) } else { ("mlp.shared_experts", 2048) };
        in_layer(&format!("{mlp}.gate_proj"), &[wide, HIDDEN]);
        in_layer(&format!("{mlp}.up_proj"), &[wide, HIDDEN]);
        in_layer(&format!("{mlp}.down_proj"), &[HIDDEN, wide]);
        if layer > 0 {
            in_layer("mlp.gate", &[EXPERTS, HIDDEN]);
        }
    }
    for layer in 1..LAYERS {
        let bias = format!("language_model.model.layers.{layer}.mlp.gate.e_score_correction_bias");
        tensors.push(Tensor::new(bias, Kind::F32, [EXPERTS]));
        tensors.extend((0..EXPERTS).flat_map(|expert| kimi_expert(layer, expert)));
    }
    tensors
}

/// The element type of a tensor, and the range of its random values.
#[derive(Clone, Copy)]
enum Kind {
    Fp8,
    /// Two codes in a byte, as I8.
    Fp4,
    /// Eight codes in a word, as I32.
    Int4,
    /// Weights or scales with magnitudes around 0.01.
    Bf16,
    /// Scales with magnitudes around 0.01.
    F32,
    /// Powers of two below 1.
    E8m0,
    /// The tensor `weight_shape`: rows and columns of a matrix, as I32.
    WeightShape([u32; 2]),
}

struct Tensor {
    name: String,
    kind: Kind,
    shape: Vec<u64>,
}

impl Tensor {
    fn new<const N: usize>(name: String, kind: Kind, shape: [u64; N]) -> Tensor {
        Tensor { name, kind, shape: shape.to_vec() }
    }

    /// Name and bytes of the element type.
    fn dtype(&self) -> (&'static str, u64) {
        match self.kind {
            Kind::Fp8 => ("F8_E4M3", 1),
            Kind::Fp4 => ("I8", 1),
            Kind::E8m0 => ("F8_E8M0", 1),
            Kind::Bf16 => ("BF16", 2),
            Kind::Int4 | Kind::WeightShape(_) => ("I32", 4),
            Kind::F32 => ("F32", 4),
        }
    }

    fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype().1
    }

    fn write(&self, to: &mut impl std::io::Write, seed: u64) -> Result<()> {
        if let Kind::WeightShape(shape) = self.kind {
            return Ok(to.write_all(shape.map(u32::to_le_bytes).as_flattened())?);
        }
        // For each 8 bytes: which bits are random, and the value of the other bits.
        let [random_bits, fixed] = match self.kind {
            // The lowest mantissa bit is 0, so that there is no NaN.
            Kind::Fp8 => [0xFEFE_FEFE_FEFE_FEFE, 0],
            Kind::Fp4 | Kind::Int4 | Kind::WeightShape(_) => [u64::MAX, 0],
            Kind::Bf16 => [0x80FF_80FF_80FF_80FF, 0x3C00_3C00_3C00_3C00],
            Kind::F32 => [0x00FF_FFFF_00FF_FFFF, 0x3C00_0000_3C00_0000],
            Kind::E8m0 => [0x0F0F_0F0F_0F0F_0F0F, 0x7070_7070_7070_7070],
        };
        let mut state = seed;
        let mut piece = vec![0; 1 << 20];
        let mut left = self.bytes();
        while left > 0 {
            for word in piece.as_chunks_mut::<8>().0 {
                *word = (split_mix(&mut state) & random_bits | fixed).to_le_bytes();
            }
            let n = left.min(1 << 20);
            to.write_all(&piece[..usize::try_from(n)?])?;
            left -= n;
        }
        Ok(())
    }
}

/// The random number generator SplitMix64.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The data after the header of a shard.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Random,
    Hole,
}

fn write_shard(path: &Path, tensors: &[Tensor], content: Content) -> Result<()> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for tensor in tensors {
        let (dtype, start) = (tensor.dtype().0, end);
        end += tensor.bytes();
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let shown = || format!("cannot write `{}`", path.display());
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).with_context(shown)?);
    file.write_all(&u64::try_from(header.len())?.to_le_bytes())?;
    file.write_all(&header)?;
    if content == Content::Random {
        for (tensor, seed) in tensors.iter().zip(1..) {
            tensor.write(&mut file, seed).with_context(shown)?;
        }
    }
    let file = file.into_inner().with_context(shown)?;
    file.set_len(8 + u64::try_from(header.len())? + end)?;
    Ok(file.sync_all()?)
}
