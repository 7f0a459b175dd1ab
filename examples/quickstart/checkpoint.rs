//! The checkpoint that the quickstart writes, and a decoder of its elements that is independent of
//! the library.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Result;
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// Rows and columns of a block that shares one scale.
const BLOCK: usize = 128;
/// Not a multiple of [`BLOCK`], so the last blocks are incomplete.
pub const HIDDEN: usize = 320;
/// Not a multiple of [`BLOCK`] either.
pub const INTERMEDIATE: usize = 200;
pub const EXPERTS: usize = 6;
pub const LAYERS: usize = 3;
/// Whether a layer has sliding-window attention. The first layer is dense, the others have experts.
pub const SLIDING: [bool; LAYERS] = [false, true, false];
const HEADS: usize = 8;
/// K/V heads of a full-attention layer; a sliding-window layer has twice as many.
pub const KV_HEADS: usize = 4;
/// Number of tensor-parallel shards in which K and V were quantized: one for each K/V head of a
/// full-attention layer.
const KV_SHARDS: usize = KV_HEADS;
pub const K_DIM: usize = 192;
pub const V_DIM: usize = 128;
/// Number of shards.
const SHARDS: usize = 3;

/// Content of tokenizer.json, an example of a file that a view passes through.
pub const TOKENIZER: &str = "{\"version\": \"1.0\", \"added_tokens\": []}\n";

pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A published checkpoint, in memory.
pub struct Written {
    pub tensors: BTreeMap<String, Tensor>,
    random: u64,
}

impl Written {
    pub fn model() -> Written {
        let mut model = Written { tensors: BTreeMap::new(), random: 1 };
        for name in ["model.embed_tokens.weight", "lm_head.weight"] {
            model.plain(name, Dtype::BF16, &[64, HIDDEN]);
        }
        model.plain("model.norm.weight", Dtype::BF16, &[HIDDEN]);
        for (layer, sliding) in SLIDING.into_iter().enumerate() {
            let name = format!("model.layers.{layer}");
            model.layer(&name, sliding, layer > 0, "post_attention_layernorm");
        }
        // The multi-token prediction layer has sliding-window attention and is dense.
        let mtp = "model.mtp.layers.0";
        model.layer(mtp, true, false, "pre_mlp_layernorm");
        model.plain(&format!("{mtp}.eh_proj.weight"), Dtype::BF16, &[HIDDEN, 2 * HIDDEN]);
        for name in ["enorm", "hnorm", "final_layernorm"] {
            model.plain(&format!("{mtp}.{name}.weight"), Dtype::BF16, &[HIDDEN]);
        }
        model
    }

    fn layer(&mut self, layer: &str, sliding: bool, moe: bool, second_norm: &str) {
        for norm in ["input_layernorm", second_norm] {
            self.plain(&format!("{layer}.{norm}.weight"), Dtype::BF16, &[HIDDEN]);
        }
        let heads = if sliding { 2 * KV_HEADS } else { KV_HEADS };
        let blocks = |rows: usize| rows.div_ceil(BLOCK);
        // Blocks do not span shards: 4 heads of 192 rows have 4 * 2 = 8 rows of scales.
        let sharded = |rows: usize| KV_SHARDS * blocks(rows / KV_SHARDS);
        let (k, v) = (heads * K_DIM, heads * V_DIM);
        let attention = format!("{layer}.self_attn");
        self.fp8(&format!("{attention}.q_proj"), HEADS * K_DIM, HIDDEN, blocks(HEADS * K_DIM));
        self.fp8(&format!("{attention}.k_proj"), k, HIDDEN, sharded(k));
        self.fp8(&format!("{attention}.v_proj"), v, HIDDEN, sharded(v));
        self.plain(&format!("{attention}.o_proj.weight"), Dtype::BF16, &[HIDDEN, HEADS * V_DIM]);
        if sliding {
            self.plain(&format!("{attention}.attention_sink_bias"), Dtype::BF16, &[HEADS]);
        }
        let mut mlps = vec![format!("{layer}.mlp")];
        if moe {
            let gate = format!("{layer}.mlp.gate");
            self.plain(&format!("{gate}.weight"), Dtype::F32, &[EXPERTS, HIDDEN]);
            self.plain(&format!("{gate}.e_score_correction_bias"), Dtype::F32, &[EXPERTS]);
            mlps = (0..EXPERTS).map(|e| format!("{layer}.mlp.experts.{e}")).collect();
        }
        for mlp in mlps {
            for name in ["gate_proj", "up_proj"] {
                self.fp8(&format!("{mlp}.{name}"), INTERMEDIATE, HIDDEN, blocks(INTERMEDIATE));
            }
            self.fp8(&format!("{mlp}.down_proj"), HIDDEN, INTERMEDIATE, blocks(HIDDEN));
        }
    }

    /// Adds random FP8 codes and scales of a linear layer `[rows, columns]`.
    fn fp8(&mut self, name: &str, rows: usize, columns: usize, scale_rows: usize) {
        // 0x7F and 0xFF are NaN.
        let code = |byte: u8| if byte & 0x7F == 0x7F { byte - 1 } else { byte };
        let bytes = (0..rows * columns).map(|_| code(self.byte())).collect();
        let codes = Tensor { dtype: Dtype::F8_E4M3, shape: vec![rows, columns], bytes };
        self.tensors.insert(format!("{name}.weight"), codes);
        self.plain(
            &format!("{name}.weight_scale_inv"),
            Dtype::F32,
            &[scale_rows, columns.div_ceil(BLOCK)],
        );
    }

    /// Adds a tensor of random numbers between 2^-9 and 2^-8, in F32 or BF16.
    fn plain(&mut self, name: &str, dtype: Dtype, shape: &[usize]) {
        let mut bytes = Vec::new();
        for _ in 0..shape.iter().product() {
            let mantissa = u32::from_be_bytes([0, self.byte() / 2, self.byte(), self.byte()]);
            let number = f32::from_bits(0x3B00_0000 | mantissa);
            match dtype {
                Dtype::BF16 => bytes.extend(bf16::from_f32(number).to_le_bytes()),
                _ => bytes.extend(number.to_le_bytes()),
            }
        }
        self.tensors.insert(name.to_owned(), Tensor { dtype, shape: shape.to_vec(), bytes });
    }

    /// A random byte: the top byte of a linear congruential generator.
    fn byte(&mut self) -> u8 {
        self.random = self.random.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
        self.random.to_be_bytes()[0]
    }

    /// Writes the checkpoint. Tensors are dealt out to the shards in turn, so the tensors of an
    /// expert, and codes and their scales, are in different shards.
    pub fn save(&self, directory: &Path) -> Result<()> {
        let file = |i: usize| format!("model-{:05}-of-{SHARDS:05}.safetensors", i % SHARDS + 1);
        for shard in 0..SHARDS {
            let tensors = self.tensors.iter().skip(shard).step_by(SHARDS);
            let views = tensors
                .map(|(name, t)| Ok((name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes)?)));
            let views = views.collect::<Result<Vec<_>>>()?;
            let format = [("format".to_owned(), "pt".to_owned())].into();
            safetensors::serialize_to_file(views, Some(format), &directory.join(file(shard)))?;
        }
        let names: BTreeMap<_, _> = self.tensors.keys().zip((0..).map(file)).collect();
        let size: usize = self.tensors.values().map(|tensor| tensor.bytes.len()).sum();
        let index = serde_json::json!({"metadata": {"total_size": size}, "weight_map": names});
        let config = serde_json::json!({
            "model_type": "mimo_v2_flash",
            "hidden_size": HIDDEN,
            "moe_intermediate_size": INTERMEDIATE,
            "n_routed_experts": EXPERTS,
            "num_hidden_layers": LAYERS,
            "hybrid_layer_pattern": SLIDING.map(u8::from),
            "moe_layer_freq": [0, 1, 1],
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "swa_num_key_value_heads": 2 * KV_HEADS,
            "head_dim": K_DIM,
            "v_head_dim": V_DIM,
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
        });
        fs::write(directory.join("model.safetensors.index.json"), format!("{index:#}\n"))?;
        fs::write(directory.join("config.json"), format!("{config:#}\n"))?;
        Ok(fs::write(directory.join("tokenizer.json"), TOKENIZER)?)
    }

    /// The element of a linear layer: its code times the scale of its block.
    pub fn decoded(&self, name: &str, row: usize, column: usize) -> f32 {
        self.code(name, row, column) * self.scale(name, row / BLOCK, column)
    }

    /// The element of K or V. A shard was quantized as one matrix, its K rows above its V rows, so
    /// the first V rows may lie in the last block of K.
    pub fn decoded_kv(
        &self,
        layer: &str,
        heads: usize,
        projection: &str,
        row: usize,
        column: usize,
    ) -> f32 {
        let name = |projection: &str| format!("model.{layer}.self_attn.{projection}");
        let [k_rows, v_rows] = [heads * K_DIM / KV_SHARDS, heads * V_DIM / KV_SHARDS];
        let (shard, fused_row) = match projection {
            "k_proj" => (row / k_rows, row % k_rows),
            _ => (row / v_rows, k_rows + row % v_rows),
        };
        let k_blocks = k_rows.div_ceil(BLOCK);
        let block = fused_row / BLOCK;
        let scale = match block.checked_sub(k_blocks) {
            None => self.scale(&name("k_proj"), shard * k_blocks + block, column),
            Some(block) => {
                self.scale(&name("v_proj"), shard * v_rows.div_ceil(BLOCK) + block, column)
            }
        };
        self.code(&name(projection), row, column) * scale
    }

    fn code(&self, name: &str, row: usize, column: usize) -> f32 {
        let codes = &self.tensors[&format!("{name}.weight")];
        e4m3(codes.bytes[row * codes.shape[1] + column])
    }

    /// The scale in row `scale_row` for a column of the layer.
    fn scale(&self, name: &str, scale_row: usize, column: usize) -> f32 {
        let scales = &self.tensors[&format!("{name}.weight_scale_inv")];
        let at = 4 * (scale_row * scales.shape[1] + column / BLOCK);
        f32::from_le_bytes(scales.bytes[at..at + 4].try_into().expect("four bytes"))
    }
}

/// Decodes FP8 E4M3: a sign bit, four exponent bits with bias 7, three mantissa bits.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 0xF), f32::from(code & 7) / 8.0);
    let magnitude = match exponent {
        0 => mantissa * 2f32.powi(-6),
        _ => (1.0 + mantissa) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}
