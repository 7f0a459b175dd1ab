"""Five families with the common in-memory layout: experts stacked, gate before up, other tensors under their own names.

Each has what its release has and loaders trip over: DeepSeek V3 and GLM-4 their MTP layer behind the last layer, MiniMax-M2 its
own words for experts and router bias, gpt-oss MXFP4 blocks with gate and up rows interleaved. See `families.py` for the
fields.
"""

from layout import Place, place_expert, release_config, rename


def dense_mlp(out, prefix, hidden, width, kind):
    """gate_proj, up_proj, down_proj of one gated MLP."""
    for part in ("gate_proj", "up_proj"):
        out[f"{prefix}.{part}.weight"] = ([width, hidden], kind)
    out[f"{prefix}.down_proj.weight"] = ([hidden, width], kind)


def norms(out, layer, hidden):
    for norm in ("input_layernorm", "post_attention_layernorm"):
        out[f"{layer}.{norm}.weight"] = ([hidden], "bf16")


def frame(config):
    """Embedding, last norm, head."""
    hidden = config["hidden_size"]
    return {
        "model.embed_tokens.weight": ([config["vocab_size"], hidden], "bf16"),
        "model.norm.weight": ([hidden], "bf16"),
        "lm_head.weight": ([config["vocab_size"], hidden], "bf16"),
    }


def next_token_head(out, layer, config):
    """Tensors of an MTP layer that a decoder layer lacks, in DeepSeek V3 and GLM-4. None is quantized."""
    hidden = config["hidden_size"]
    out[f"{layer}.embed_tokens.weight"] = ([config["vocab_size"], hidden], "bf16")
    out[f"{layer}.shared_head.head.weight"] = ([config["vocab_size"], hidden], "bf16")
    out[f"{layer}.eh_proj.weight"] = ([hidden, 2 * hidden], "bf16")
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        out[f"{layer}.{norm}.weight"] = ([hidden], "bf16")


def routed_mlp(out, prefix, config, kind):
    """Router with correction bias, shared expert, routed experts."""
    hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    out[f"{prefix}.gate.weight"] = ([experts, hidden], "bf16")
    out[f"{prefix}.gate.e_score_correction_bias"] = ([experts], "f32")
    dense_mlp(out, f"{prefix}.shared_experts", hidden, width, kind)
    for e in range(experts):
        dense_mlp(out, f"{prefix}.experts.{e}", hidden, width, kind)


class Plain:
    """Experts named gate_proj, up_proj, down_proj. Layers from `num_hidden_layers` on are MTP layers, without a place."""

    auto = "AutoModelForCausalLM"

    def place(self, name):
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        if layer and int(layer) >= self.config["num_hidden_layers"]:
            return None
        return place_expert(name, lambda prefix: prefix, "gate_proj", "up_proj", "down_proj") or Place(name)


class DeepseekV3(Plain):
    name = "deepseek-v3"
    config = release_config(
        "deepseek-v3",
        {
            "vocab_size": 40,
            "hidden_size": 136,
            "intermediate_size": 144,
            "moe_intermediate_size": 136,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 3,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "max_position_embeddings": 256,
        },
    )

    def tensors(self):
        c = self.config
        hidden, heads, nope, rope = (
            c["hidden_size"], c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"],
        )
        out = frame(c)
        for l in range(c["num_hidden_layers"] + c["num_nextn_predict_layers"]):
            layer = f"model.layers.{l}"
            norms(out, layer, hidden)
            attn = f"{layer}.self_attn"
            out[f"{attn}.q_a_proj.weight"] = ([c["q_lora_rank"], hidden], "fp8")
            out[f"{attn}.q_a_layernorm.weight"] = ([c["q_lora_rank"]], "bf16")
            out[f"{attn}.q_b_proj.weight"] = ([heads * (nope + rope), c["q_lora_rank"]], "fp8")
            out[f"{attn}.kv_a_proj_with_mqa.weight"] = ([c["kv_lora_rank"] + rope, hidden], "fp8")
            out[f"{attn}.kv_a_layernorm.weight"] = ([c["kv_lora_rank"]], "bf16")
            out[f"{attn}.kv_b_proj.weight"] = ([heads * (nope + c["v_head_dim"]), c["kv_lora_rank"]], "fp8")
            out[f"{attn}.o_proj.weight"] = ([hidden, heads * c["v_head_dim"]], "fp8")
            if l < c["first_k_dense_replace"]:
                dense_mlp(out, f"{layer}.mlp", hidden, c["intermediate_size"], "fp8")
            else:
                routed_mlp(out, f"{layer}.mlp", c, "fp8")
            if l >= c["num_hidden_layers"]:
                next_token_head(out, layer, c)
        return out


class Qwen3Moe(Plain):
    name = "qwen3-moe"
    config = release_config(
        "qwen3-30b-a3b",
        {
            "vocab_size": 40,
            "hidden_size": 64,
            "intermediate_size": 64,
            "moe_intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 256,
            "max_window_layers": 2,
        },
    )

    def tensors(self):
        c = self.config
        hidden, dim = c["hidden_size"], c["head_dim"]
        out = frame(c)
        for l in range(c["num_hidden_layers"]):
            layer = f"model.layers.{l}"
            norms(out, layer, hidden)
            for part, heads in (("q", c["num_attention_heads"]), ("k", c["num_key_value_heads"]), ("v", c["num_key_value_heads"])):
                out[f"{layer}.self_attn.{part}_proj.weight"] = ([heads * dim, hidden], "bf16")
            out[f"{layer}.self_attn.o_proj.weight"] = ([hidden, c["num_attention_heads"] * dim], "bf16")
            for part in ("q", "k"):
                out[f"{layer}.self_attn.{part}_norm.weight"] = ([dim], "bf16")
            out[f"{layer}.mlp.gate.weight"] = ([c["num_experts"], hidden], "bf16")
            for e in range(c["num_experts"]):
                dense_mlp(out, f"{layer}.mlp.experts.{e}", hidden, c["moe_intermediate_size"], "bf16")
        return out


class Glm4Moe(Plain):
    name = "glm4-moe"
    config = release_config(
        "glm-4.5",
        {
            "vocab_size": 40,
            "hidden_size": 64,
            "intermediate_size": 64,
            "moe_intermediate_size": 40,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 256,
        },
    )

    def tensors(self):
        c = self.config
        hidden, dim = c["hidden_size"], c["head_dim"]
        out = frame(c)
        for l in range(c["num_hidden_layers"] + c["num_nextn_predict_layers"]):
            layer = f"model.layers.{l}"
            norms(out, layer, hidden)
            for part, heads in (("q", c["num_attention_heads"]), ("k", c["num_key_value_heads"]), ("v", c["num_key_value_heads"])):
                out[f"{layer}.self_attn.{part}_proj.weight"] = ([heads * dim, hidden], "bf16")
                out[f"{layer}.self_attn.{part}_proj.bias"] = ([heads * dim], "bf16")
            out[f"{layer}.self_attn.o_proj.weight"] = ([hidden, c["num_attention_heads"] * dim], "bf16")
            for part in ("q", "k"):
                out[f"{layer}.self_attn.{part}_norm.weight"] = ([dim], "bf16")
            if l < c["first_k_dense_replace"]:
                dense_mlp(out, f"{layer}.mlp", hidden, c["intermediate_size"], "bf16")
            else:
                routed_mlp(out, f"{layer}.mlp", c, "bf16")
            if l >= c["num_hidden_layers"]:
                next_token_head(out, layer, c)
        return out


class MiniMaxM2:
    """MiniMax-M2: `block_sparse_moe` is `mlp` in memory, w1, w3, w2 are gate, up, down; q and k norms cover all heads."""

    name = "minimax-m2"
    auto = "AutoModelForCausalLM"
    config = release_config(
        "minimax-m2.7",
        {
            "vocab_size": 40,
            "hidden_size": 136,
            "intermediate_size": 136,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 48,
            "rotary_dim": 24,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "attn_type_list": [1, 1],
            "max_position_embeddings": 256,
        },
    )

    rules = [
        (r"(.*)\.block_sparse_moe\.(gate\.weight|e_score_correction_bias)", r"\1.mlp.\2"),
        (r"(.*)", r"\1"),
    ]

    def tensors(self):
        c = self.config
        hidden, dim, width = c["hidden_size"], c["head_dim"], c["intermediate_size"]
        out = frame(c)
        for l in range(c["num_hidden_layers"]):
            layer = f"model.layers.{l}"
            norms(out, layer, hidden)
            for part, heads in (("q", c["num_attention_heads"]), ("k", c["num_key_value_heads"]), ("v", c["num_key_value_heads"])):
                out[f"{layer}.self_attn.{part}_proj.weight"] = ([heads * dim, hidden], "fp8")
                if part != "v":
                    out[f"{layer}.self_attn.{part}_norm.weight"] = ([heads * dim], "bf16")
            out[f"{layer}.self_attn.o_proj.weight"] = ([hidden, c["num_attention_heads"] * dim], "fp8")
            moe = f"{layer}.block_sparse_moe"
            out[f"{moe}.gate.weight"] = ([c["num_local_experts"], hidden], "f32")
            out[f"{moe}.e_score_correction_bias"] = ([c["num_local_experts"]], "f32")
            for e in range(c["num_local_experts"]):
                for part in ("w1", "w3"):
                    out[f"{moe}.experts.{e}.{part}.weight"] = ([width, hidden], "fp8")
                out[f"{moe}.experts.{e}.w2.weight"] = ([hidden, width], "fp8")
        return out

    def place(self, name):
        expert = place_expert(name, lambda p: p.replace(".block_sparse_moe", ".mlp"), "w1", "w3", "w2")
        return expert or Place(rename(name, self.rules))


class GptOss:
    """gpt-oss: experts published as MXFP4 `[E, out, in/32, 16]`, in memory `[E, in, out]`; gate and up columns alternate."""

    name = "gpt-oss"
    auto = "AutoModelForCausalLM"
    config = release_config(
        "gpt-oss-20b",
        {
            "vocab_size": 40,
            "hidden_size": 96,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "experts_per_token": 2,
            "pad_token_id": 39,
            "max_position_embeddings": 256,
        },
    )

    def tensors(self):
        c = self.config
        hidden, dim, width, experts = c["hidden_size"], c["head_dim"], c["intermediate_size"], c["num_local_experts"]
        out = frame(c)

        def affine(prefix, rows, cols):
            out[f"{prefix}.weight"] = ([rows, cols], "bf16")
            out[f"{prefix}.bias"] = ([rows], "bf16")

        for l in range(c["num_hidden_layers"]):
            layer = f"model.layers.{l}"
            norms(out, layer, hidden)
            for part, heads in (("q", c["num_attention_heads"]), ("k", c["num_key_value_heads"]), ("v", c["num_key_value_heads"])):
                affine(f"{layer}.self_attn.{part}_proj", heads * dim, hidden)
            affine(f"{layer}.self_attn.o_proj", hidden, c["num_attention_heads"] * dim)
            out[f"{layer}.self_attn.sinks"] = ([c["num_attention_heads"]], "bf16")
            affine(f"{layer}.mlp.router", experts, hidden)
            out[f"{layer}.mlp.experts.gate_up_proj"] = ([experts, 2 * width, hidden], "mxfp4")
            out[f"{layer}.mlp.experts.gate_up_proj_bias"] = ([experts, 2 * width], "bf16")
            out[f"{layer}.mlp.experts.down_proj"] = ([experts, hidden, width], "mxfp4")
            out[f"{layer}.mlp.experts.down_proj_bias"] = ([experts, hidden], "bf16")
        return out

    def place(self, name):
        return Place(name)


PLAIN_FAMILIES = (DeepseekV3(), Qwen3Moe(), Glm4Moe(), MiniMaxM2(), GptOss())
