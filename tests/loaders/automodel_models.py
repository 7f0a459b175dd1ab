"""Builds nemo-automodel's models of the nine families at toy size on CPU, for the other scripts."""

import importlib
import json
import tempfile
from pathlib import Path

import torch
from nemo_automodel.components.models.common.utils import BackendConfig
from nemo_automodel.components.models.kimi_k25_vl import state_dict_adapter as kimi_adapter
from transformers.initialization import no_init_weights

CLASSES = {
    "mimo-v2-flash": ("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
    "deepseek-v4": ("deepseek_v4", "DeepseekV4ForCausalLM"),
    "kimi-k25-vl": ("kimi_k25_vl", "KimiK25VLForConditionalGeneration"),
    "qwen3-vl-moe": ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "qwen3-moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "glm4-moe": ("glm4_moe", "Glm4MoeForCausalLM"),
    "minimax-m2": ("minimax_m2", "MiniMaxM2ForCausalLM"),
    "gpt-oss": ("gpt_oss", "GptOssForCausalLM"),
}


def run_on_cpu():
    """Patches calls that need CUDA: Kimi's adapter decodes on it, and some constructors ask for the current device."""
    decode = kimi_adapter.dequantize_int4
    kimi_adapter.dequantize_int4 = lambda *tensors, device: decode(*tensors, device="cpu")
    torch.cuda.current_device = lambda: 0


def without_code(directory):
    """A new directory with the same config.json, without `auto_map`, which names Python files that a toy does not have."""
    config = json.loads((Path(directory) / "config.json").read_text())
    config.pop("auto_map", None)
    copy = tempfile.mkdtemp()
    (Path(copy) / "config.json").write_text(json.dumps(config))
    return copy


def build(family, directory, adapter):
    """The family's model for a directory's config.json, with or without state dict adapter. Its weights are arbitrary."""
    if family == "minimax-m2":
        directory = without_code(directory)
    module, name = CLASSES[family]
    module = importlib.import_module(f"nemo_automodel.components.models.{module}.model")
    backend = BackendConfig(
        attn="flex" if family == "gpt-oss" else "sdpa",
        linear="torch",
        rms_norm="torch_fp32",
        experts="torch",
        dispatcher="torch",
        enable_hf_state_dict_adapter=adapter,
    )
    # Qwen3-VL's constructor initializes weights, and needs the current CUDA device for that.
    with no_init_weights():
        return getattr(module, name).from_pretrained(str(directory), backend=backend)
