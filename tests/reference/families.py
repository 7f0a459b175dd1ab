"""Families with layouts of their own, at toy size: published tensors, and where transformers keeps them in memory.

A family has
    config      its release's config.json with small sizes
    tensors()   name -> (shape, kind), kind one of bf16, f32, i64, fp8, fp8_k, fp8_v, fp8_e8m0, fp4, int4, mxfp4
    scale       suffix of the scale next to an FP8 weight, by default weight_scale_inv
    place(name) published name -> Place, or None if the transformers class has no such tensor
Names and operations follow transformers 5.23; `transformers_views.py make` checks them against that package.
"""

import re

from layout import Place, place_expert, release_config, rename
from plain_families import PLAIN_FAMILIES


class MiMo:
    """MiMo-V2-Flash. Layer 0: dense, full attention. Layer 1: experts, sliding window. Layer 2: experts, full attention.

    Full-attention layers have fused K/V scales: 192 rows of K and 128 of V in a shard end within a block. Those with a
    window, MTP layers too, have twice the K/V heads and sinks; a shard of theirs ends where a block does.
    """

    name = "mimo-v2-flash"
    auto = "AutoModelForCausalLM"
    shards = 2
    config = release_config(
        "mimo-v2-flash",
        {
            "vocab_size": 40,
            "hidden_size": 136,
            "intermediate_size": 144,
            "moe_intermediate_size": 144,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "hybrid_layer_pattern": [0, 1, 0],
            "moe_layer_freq": [0, 1, 1],
            "n_routed_experts": 3,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "sliding_window_size": 8,
            "attention_chunk_size": 8,
            "max_position_embeddings": 256,
            "quantization_config": {
                "ignored_layers": [
                    "model.layers.0.self_attn.o_proj",
                    "model.layers.1.self_attn.o_proj",
                    "model.layers.2.self_attn.o_proj",
                    "model.decoder.self_attn.o_proj",
                ],
            },
        },
        # Without this key, transformers uses the full-attention layers of the release: 0, 5, 11, … of 48.
        extra={"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    )
    # The release has three, which config.json does not state.
    mtp_layers = 2

    def tensors(self):
        c = self.config
        hidden, heads = c["hidden_size"], c["num_attention_heads"]
        out = {
            "model.embed_tokens.weight": ([c["vocab_size"], hidden], "bf16"),
            "model.norm.weight": ([hidden], "bf16"),
            "lm_head.weight": ([c["vocab_size"], hidden], "bf16"),
        }

        def mlp(prefix, width):
            for part in ("gate_proj", "up_proj"):
                out[f"{prefix}.{part}.weight"] = ([width, hidden], "fp8")
            out[f"{prefix}.down_proj.weight"] = ([hidden, width], "fp8")

        def layer(prefix, sliding, second_norm="post_attention_layernorm"):
            kv = c["swa_num_key_value_heads"] if sliding else c["num_key_value_heads"]
            for norm in ("input_layernorm", second_norm):
                out[f"{prefix}.{norm}.weight"] = ([hidden], "bf16")
            out[f"{prefix}.self_attn.q_proj.weight"] = ([heads * c["head_dim"], hidden], "fp8")
            out[f"{prefix}.self_attn.k_proj.weight"] = ([kv * c["head_dim"], hidden], "fp8_k")
            out[f"{prefix}.self_attn.v_proj.weight"] = ([kv * c["v_head_dim"], hidden], "fp8_v")
            out[f"{prefix}.self_attn.o_proj.weight"] = ([hidden, heads * c["v_head_dim"]], "bf16")
            if sliding:
                out[f"{prefix}.self_attn.attention_sink_bias"] = ([heads], "bf16")

        for l, (sliding, sparse) in enumerate(zip(c["hybrid_layer_pattern"], c["moe_layer_freq"])):
            layer(f"model.layers.{l}", sliding)
            if not sparse:
                mlp(f"model.layers.{l}.mlp", c["intermediate_size"])
                continue
            out[f"model.layers.{l}.mlp.gate.weight"] = ([c["n_routed_experts"], hidden], "f32")
            out[f"model.layers.{l}.mlp.gate.e_score_correction_bias"] = ([c["n_routed_experts"]], "f32")
            for e in range(c["n_routed_experts"]):
                mlp(f"model.layers.{l}.mlp.experts.{e}", c["moe_intermediate_size"])
        for k in range(self.mtp_layers):
            mtp = f"model.mtp.layers.{k}"
            layer(mtp, True, "pre_mlp_layernorm")
            mlp(f"{mtp}.mlp", c["intermediate_size"])
            for norm in ("enorm", "hnorm", "final_layernorm"):
                out[f"{mtp}.{norm}.weight"] = ([hidden], "bf16")
            out[f"{mtp}.eh_proj.weight"] = ([hidden, 2 * hidden], "bf16")
        return out

    def place(self, name):
        if name.startswith("model.mtp."):
            return None
        expert = place_expert(name, lambda prefix: prefix, "gate_proj", "up_proj", "down_proj")
        return expert or Place(name.replace(".attention_sink_bias", ".sinks"))


class DeepseekV4:
    """DeepSeek V4 Flash: FP4 experts, FP8 linears, both with E8M0 scales.

    Layers 0 and 1 have hash routing. Layer 0 has no compressor, layer 2 one of rate 128, layers 1 and 3 one of rate 4
    with an indexer. These are all kinds of layer of the release.
    """

    name = "deepseek-v4"
    auto = "AutoModelForCausalLM"
    scale = "scale"
    linears, experts = "fp8_e8m0", "fp4"
    sizes = {
        "vocab_size": 40,
        "hidden_size": 160,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_hash_layers": 2,
        "compress_ratios": [0, 4, 128, 4, 0],
        "num_attention_heads": 2,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 96,
        "o_lora_rank": 64,
        "o_groups": 2,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 4,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "n_routed_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "max_position_embeddings": 512,
    }
    config = release_config("deepseek-v4-flash", sizes)

    # Rules from published to in-memory suffixes of a layer; the first match applies.
    layer_rules = [
        (r"attn_norm\.weight", r"input_layernorm.weight"),
        (r"ffn_norm\.weight", r"post_attention_layernorm.weight"),
        (r"hc_(attn|ffn)_(fn|base|scale)", r"\1_hc.\2"),
        (r"attn\.attn_sink", r"self_attn.sinks"),
        (r"attn\.wq_a\.weight", r"self_attn.q_a_proj.weight"),
        (r"attn\.wq_b\.weight", r"self_attn.q_b_proj.weight"),
        (r"attn\.wkv\.weight", r"self_attn.kv_proj.weight"),
        (r"attn\.wo_([ab])\.weight", r"self_attn.o_\1_proj.weight"),
        (r"attn\.q_norm\.weight", r"self_attn.q_a_norm.weight"),
        (r"attn\.kv_norm\.weight", r"self_attn.kv_norm.weight"),
        (r"attn\.compressor\.ape", r"self_attn.compressor.position_bias"),
        (r"attn\.compressor\.wkv\.weight", r"self_attn.compressor.kv_proj.weight"),
        (r"attn\.compressor\.wgate\.weight", r"self_attn.compressor.gate_proj.weight"),
        (r"attn\.compressor\.norm\.weight", r"self_attn.compressor.kv_norm.weight"),
        (r"attn\.indexer\.compressor\.ape", r"self_attn.compressor.indexer.position_bias"),
        (r"attn\.indexer\.compressor\.wkv\.weight", r"self_attn.compressor.indexer.kv_proj.weight"),
        (r"attn\.indexer\.compressor\.wgate\.weight", r"self_attn.compressor.indexer.gate_proj.weight"),
        (r"attn\.indexer\.compressor\.norm\.weight", r"self_attn.compressor.indexer.kv_norm.weight"),
        (r"attn\.indexer\.wq_b\.weight", r"self_attn.compressor.indexer.q_b_proj.weight"),
        (r"attn\.indexer\.weights_proj\.weight", r"self_attn.compressor.indexer.scorer.weights_proj.weight"),
        (r"ffn\.gate\.weight", r"mlp.gate.weight"),
        (r"ffn\.gate\.bias", r"mlp.gate.e_score_correction_bias"),
        (r"ffn\.gate\.tid2eid", r"mlp.gate.tid2eid"),
        (r"ffn\.shared_experts\.w1\.weight", r"mlp.shared_experts.gate_proj.weight"),
        (r"ffn\.shared_experts\.w3\.weight", r"mlp.shared_experts.up_proj.weight"),
        (r"ffn\.shared_experts\.w2\.weight", r"mlp.shared_experts.down_proj.weight"),
    ]
    top_rules = [
        (r"embed\.weight", r"model.embed_tokens.weight"),
        (r"norm\.weight", r"model.norm.weight"),
        (r"head\.weight", r"lm_head.weight"),
        (r"hc_head_(fn|base|scale)", r"model.hc_head.hc_\1"),
    ]

    def tensors(self):
        c = self.config
        hidden, width, mult = c["hidden_size"], c["moe_intermediate_size"], c["hc_mult"]
        heads, dim, rank = c["num_attention_heads"], c["head_dim"], c["q_lora_rank"]
        out = {
            "embed.weight": ([c["vocab_size"], hidden], "bf16"),
            "norm.weight": ([hidden], "bf16"),
            "head.weight": ([c["vocab_size"], hidden], "bf16"),
        }

        def head(prefix):
            out[f"{prefix}hc_head_fn"] = ([mult, mult * hidden], "f32")
            out[f"{prefix}hc_head_base"] = ([mult], "f32")
            out[f"{prefix}hc_head_scale"] = ([1], "f32")

        def compressor(prefix, ratio, dim):
            wide = 2 * dim if ratio == 4 else dim
            out[f"{prefix}.ape"] = ([ratio, wide], "f32")
            out[f"{prefix}.wkv.weight"] = ([wide, hidden], "bf16")
            out[f"{prefix}.wgate.weight"] = ([wide, hidden], "bf16")
            out[f"{prefix}.norm.weight"] = ([dim], "bf16")

        def mlp(prefix, kind):
            for part in ("w1", "w3"):
                out[f"{prefix}.{part}.weight"] = ([width, hidden], kind)
            out[f"{prefix}.w2.weight"] = ([hidden, width], kind)

        def layer(prefix, ratio, hashed):
            for norm in ("attn_norm", "ffn_norm"):
                out[f"{prefix}.{norm}.weight"] = ([hidden], "bf16")
            for site in ("attn", "ffn"):
                out[f"{prefix}.hc_{site}_fn"] = ([(2 + mult) * mult, mult * hidden], "f32")
                out[f"{prefix}.hc_{site}_base"] = ([(2 + mult) * mult], "f32")
                out[f"{prefix}.hc_{site}_scale"] = ([3], "f32")
            attn, groups = f"{prefix}.attn", c["o_groups"]
            out[f"{attn}.attn_sink"] = ([heads], "f32")
            out[f"{attn}.wq_a.weight"] = ([rank, hidden], self.linears)
            out[f"{attn}.wq_b.weight"] = ([heads * dim, rank], self.linears)
            out[f"{attn}.wkv.weight"] = ([dim, hidden], self.linears)
            out[f"{attn}.wo_a.weight"] = ([groups * c["o_lora_rank"], heads * dim // groups], self.linears)
            out[f"{attn}.wo_b.weight"] = ([hidden, groups * c["o_lora_rank"]], self.linears)
            out[f"{attn}.q_norm.weight"] = ([rank], "bf16")
            out[f"{attn}.kv_norm.weight"] = ([dim], "bf16")
            if ratio:
                compressor(f"{attn}.compressor", ratio, dim)
            if ratio == 4:
                compressor(f"{attn}.indexer.compressor", ratio, c["index_head_dim"])
                out[f"{attn}.indexer.wq_b.weight"] = ([c["index_n_heads"] * c["index_head_dim"], rank], self.linears)
                out[f"{attn}.indexer.weights_proj.weight"] = ([c["index_n_heads"], hidden], "bf16")
            out[f"{prefix}.ffn.gate.weight"] = ([c["n_routed_experts"], hidden], "bf16")
            if hashed:
                out[f"{prefix}.ffn.gate.tid2eid"] = ([c["vocab_size"], c["num_experts_per_tok"]], "i64")
            else:
                out[f"{prefix}.ffn.gate.bias"] = ([c["n_routed_experts"]], "f32")
            mlp(f"{prefix}.ffn.shared_experts", self.linears)
            for e in range(c["n_routed_experts"]):
                mlp(f"{prefix}.ffn.experts.{e}", self.experts)

        head("")
        for l in range(c["num_hidden_layers"]):
            layer(f"layers.{l}", c["compress_ratios"][l], l < c["num_hash_layers"])
        layer("mtp.0", 0, False)
        head("mtp.0.")
        for norm in ("enorm", "hnorm", "norm"):
            out[f"mtp.0.{norm}.weight"] = ([hidden], "bf16")
        for part in ("e_proj", "h_proj"):
            out[f"mtp.0.{part}.weight"] = ([hidden, hidden], self.linears)
        return out

    def place(self, name):
        if name.startswith("mtp."):
            return None
        expert = place_expert(name, lambda p: "model." + p.replace(".ffn", ".mlp"), "w1", "w3", "w2")
        if expert:
            return expert
        layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        if layer:
            return Place(f"model.layers.{layer[1]}.{rename(layer[2], self.layer_rules)}")
        return Place(rename(name, self.top_rules))


class DeepseekV4Base(DeepseekV4):
    """DeepSeek V4 Flash Base: the same layers, all linears and experts FP8 in 128x128 blocks with F32 scales."""

    name = "deepseek-v4-base"
    linears, experts = "fp8", "fp8"
    config = release_config(
        "deepseek-v4-flash-base", DeepseekV4.sizes | {"hidden_size": 136, "moe_intermediate_size": 144}
    )


class KimiK25:
    """Kimi K2.5: INT4 experts in the text model, a vision tower with fused and interleaved rotary attention."""

    name = "kimi-k25-vl"
    auto = "AutoModelForImageTextToText"
    config = release_config(
        "kimi-k2.5",
        {
            "pad_token_id": 39,
            "text_config": {
                "vocab_size": 40,
                "hidden_size": 96,
                "intermediate_size": 80,
                "moe_intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "q_lora_rank": 48,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "n_routed_experts": 3,
                "num_experts_per_tok": 2,
                "max_position_embeddings": 256,
                "pad_token_id": 39,
            },
            "vision_config": {
                "patch_size": 2,
                "vt_num_attention_heads": 2,
                "vt_num_hidden_layers": 2,
                "vt_hidden_size": 32,
                "vt_intermediate_size": 48,
                "mm_hidden_size": 32,
                "text_hidden_size": 96,
                "init_pos_emb_height": 4,
                "init_pos_emb_width": 4,
            },
        },
        # The release names the sizes vt_* and init_*, transformers reads the plain names. Both have the same values
        # here.
        extra={
            "projection_hidden_size": 32,
            "vision_config": {
                "model_type": "kimi_k25_vision",
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "pos_emb_time": 4,
            },
        },
    )

    rules = [
        (r"language_model\.model\.(.*)", r"model.language_model.\1"),
        (r"language_model\.lm_head\.weight", r"lm_head.weight"),
        (r"vision_tower\.patch_embed\.pos_emb\.weight", r"model.vision_tower.patch_embed.pos_emb.position_embeddings"),
        (r"vision_tower\.patch_embed\.proj\.(.*)", r"model.vision_tower.patch_embed.proj.\1"),
        (r"vision_tower\.encoder\.final_layernorm\.(.*)", r"model.vision_tower.final_layernorm.\1"),
        (r"vision_tower\.encoder\.blocks\.(\d+)\.norm0\.(.*)", r"model.vision_tower.layers.\1.norm1.\2"),
        (r"vision_tower\.encoder\.blocks\.(\d+)\.norm1\.(.*)", r"model.vision_tower.layers.\1.norm2.\2"),
        (r"vision_tower\.encoder\.blocks\.(\d+)\.mlp\.fc0\.(.*)", r"model.vision_tower.layers.\1.mlp.fc1.\2"),
        (r"vision_tower\.encoder\.blocks\.(\d+)\.mlp\.fc1\.(.*)", r"model.vision_tower.layers.\1.mlp.fc2.\2"),
        (r"vision_tower\.encoder\.blocks\.(\d+)\.wo\.(.*)", r"model.vision_tower.layers.\1.attn.proj.\2"),
        (r"mm_projector\.pre_norm\.(.*)", r"model.mm_projector.pre_norm.\1"),
        (r"mm_projector\.proj\.0\.(.*)", r"model.mm_projector.in_proj.\1"),
        (r"mm_projector\.proj\.2\.(.*)", r"model.mm_projector.out_proj.\1"),
    ]

    def tensors(self):
        c, v = self.config["text_config"], self.config["vision_config"]
        hidden, heads, nope, rope = (
            c["hidden_size"], c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"],
        )
        out = {
            "language_model.model.embed_tokens.weight": ([c["vocab_size"], hidden], "bf16"),
            "language_model.model.norm.weight": ([hidden], "bf16"),
            "language_model.lm_head.weight": ([c["vocab_size"], hidden], "bf16"),
        }

        def mlp(prefix, width, kind="bf16"):
            for part in ("gate_proj", "up_proj"):
                out[f"{prefix}.{part}.weight"] = ([width, hidden], kind)
            out[f"{prefix}.down_proj.weight"] = ([hidden, width], kind)

        for l in range(c["num_hidden_layers"]):
            layer = f"language_model.model.layers.{l}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                out[f"{layer}.{norm}.weight"] = ([hidden], "bf16")
            attn = f"{layer}.self_attn"
            out[f"{attn}.q_a_proj.weight"] = ([c["q_lora_rank"], hidden], "bf16")
            out[f"{attn}.q_a_layernorm.weight"] = ([c["q_lora_rank"]], "bf16")
            out[f"{attn}.q_b_proj.weight"] = ([heads * (nope + rope), c["q_lora_rank"]], "bf16")
            out[f"{attn}.kv_a_proj_with_mqa.weight"] = ([c["kv_lora_rank"] + rope, hidden], "bf16")
            out[f"{attn}.kv_a_layernorm.weight"] = ([c["kv_lora_rank"]], "bf16")
            out[f"{attn}.kv_b_proj.weight"] = ([heads * (nope + c["v_head_dim"]), c["kv_lora_rank"]], "bf16")
            out[f"{attn}.o_proj.weight"] = ([hidden, heads * c["v_head_dim"]], "bf16")
            if l < c["first_k_dense_replace"]:
                mlp(f"{layer}.mlp", c["intermediate_size"])
                continue
            out[f"{layer}.mlp.gate.weight"] = ([c["n_routed_experts"], hidden], "bf16")
            out[f"{layer}.mlp.gate.e_score_correction_bias"] = ([c["n_routed_experts"]], "f32")
            mlp(f"{layer}.mlp.shared_experts", c["moe_intermediate_size"])
            for e in range(c["n_routed_experts"]):
                mlp(f"{layer}.mlp.experts.{e}", c["moe_intermediate_size"], "int4")

        def affine(prefix, rows, *cols):
            out[f"{prefix}.weight"] = ([rows, *cols], "bf16")
            out[f"{prefix}.bias"] = ([rows], "bf16")

        dim, patch = v["vt_hidden_size"], v["patch_size"]
        out["vision_tower.patch_embed.pos_emb.weight"] = ([v["pos_emb_height"], v["pos_emb_width"], dim], "bf16")
        affine("vision_tower.patch_embed.proj", dim, 3, patch, patch)
        for b in range(v["vt_num_hidden_layers"]):
            block = f"vision_tower.encoder.blocks.{b}"
            affine(f"{block}.norm0", dim)
            affine(f"{block}.norm1", dim)
            affine(f"{block}.wqkv", 3 * dim, dim)
            affine(f"{block}.wo", dim, dim)
            affine(f"{block}.mlp.fc0", v["vt_intermediate_size"], dim)
            affine(f"{block}.mlp.fc1", dim, v["vt_intermediate_size"])
        affine("vision_tower.encoder.final_layernorm", dim)
        merged = dim * v["merge_kernel_size"][0] * v["merge_kernel_size"][1]
        affine("mm_projector.pre_norm", dim)
        affine("mm_projector.proj.0", merged, merged)
        affine("mm_projector.proj.2", hidden, merged)
        return out

    def rotary_rows(self, part):
        """Reorders interleaved rotary pairs to halves: row h*d + p*d/2 + j of the result is row h*d + 2*j + p of `part`."""
        heads = self.config["vision_config"]["vt_num_attention_heads"]
        dim = part.shape[0] // heads
        index = [h * dim + 2 * j + p for h in range(heads) for p in range(2) for j in range(dim // 2)]
        return part[index]

    def place(self, name):
        expert = place_expert(name, lambda prefix: rename(prefix, self.rules), "gate_proj", "up_proj", "down_proj")
        if expert:
            return expert
        fused = re.fullmatch(r"vision_tower\.encoder\.blocks\.(\d+)\.wqkv\.(weight|bias)", name)
        if fused:
            target = f"model.vision_tower.layers.{fused[1]}.attn.{{}}_proj.{fused[2]}"
            return [
                Place(target.format("q"), convert=lambda x: self.rotary_rows(x.chunk(3)[0])),
                Place(target.format("k"), convert=lambda x: self.rotary_rows(x.chunk(3)[1])),
                Place(target.format("v"), convert=lambda x: x.chunk(3)[2]),
            ]
        return Place(rename(name, self.rules))


class Qwen3VLMoe:
    """Qwen3-VL-MoE: experts published stacked, in BF16, with the matrices of each expert transposed."""

    name = "qwen3-vl-moe"
    auto = "AutoModelForImageTextToText"
    config = release_config(
        "qwen3-vl-30b-a3b",
        {
            "text_config": {
                "vocab_size": 40,
                "hidden_size": 96,
                "intermediate_size": 64,
                "moe_intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "max_position_embeddings": 256,
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "patch_size": 2,
                "out_hidden_size": 96,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
        },
        # The default sections of transformers are for heads of 128.
        extra={
            "text_config": {
                "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            },
        },
    )

    def tensors(self):
        c, v = self.config["text_config"], self.config["vision_config"]
        hidden, dim = c["hidden_size"], c["head_dim"]
        heads, kv, experts, width = (
            c["num_attention_heads"], c["num_key_value_heads"], c["num_experts"], c["moe_intermediate_size"],
        )
        shapes = {
            "model.language_model.embed_tokens.weight": [c["vocab_size"], hidden],
            "model.language_model.norm.weight": [hidden],
            "lm_head.weight": [c["vocab_size"], hidden],
        }
        for l in range(c["num_hidden_layers"]):
            layer = f"model.language_model.layers.{l}"
            shapes |= {
                f"{layer}.input_layernorm.weight": [hidden],
                f"{layer}.post_attention_layernorm.weight": [hidden],
                f"{layer}.self_attn.q_proj.weight": [heads * dim, hidden],
                f"{layer}.self_attn.k_proj.weight": [kv * dim, hidden],
                f"{layer}.self_attn.v_proj.weight": [kv * dim, hidden],
                f"{layer}.self_attn.o_proj.weight": [hidden, heads * dim],
                f"{layer}.self_attn.q_norm.weight": [dim],
                f"{layer}.self_attn.k_norm.weight": [dim],
                f"{layer}.mlp.gate.weight": [experts, hidden],
                f"{layer}.mlp.experts.gate_up_proj": [experts, hidden, 2 * width],
                f"{layer}.mlp.experts.down_proj": [experts, width, hidden],
            }

        def affine(prefix, rows, *cols):
            shapes[f"{prefix}.weight"] = [rows, *cols]
            shapes[f"{prefix}.bias"] = [rows]

        size, patch, inner = v["hidden_size"], v["patch_size"], v["intermediate_size"]
        merged = size * v["spatial_merge_size"] ** 2
        affine("model.visual.patch_embed.proj", size, v["in_channels"], v["temporal_patch_size"], patch, patch)
        shapes["model.visual.pos_embed.weight"] = [v["num_position_embeddings"], size]
        for b in range(v["depth"]):
            block = f"model.visual.blocks.{b}"
            affine(f"{block}.norm1", size)
            affine(f"{block}.norm2", size)
            affine(f"{block}.attn.qkv", 3 * size, size)
            affine(f"{block}.attn.proj", size, size)
            affine(f"{block}.mlp.linear_fc1", inner, size)
            affine(f"{block}.mlp.linear_fc2", size, inner)
        deepstack = [f"deepstack_merger_list.{i}" for i, _ in enumerate(v["deepstack_visual_indexes"])]
        for merger in ("merger", *deepstack):
            norm = size if merger == "merger" else merged
            affine(f"model.visual.{merger}.norm", norm)
            affine(f"model.visual.{merger}.linear_fc1", merged, merged)
            affine(f"model.visual.{merger}.linear_fc2", v["out_hidden_size"], merged)
        return {name: (shape, "bf16") for name, shape in shapes.items()}

    def place(self, name):
        if re.search(r"\.mlp\.experts\.(gate_up_proj|down_proj)$", name):
            return Place(name, convert=lambda x: x.transpose(1, 2).contiguous())
        return Place(name)


FAMILIES = {family.name: family for family in (MiMo(), DeepseekV4(), DeepseekV4Base(), KimiK25(), Qwen3VLMoe(), *PLAIN_FAMILIES)}
