"""nemo-automodel's models of the nine families on CPU, at toy size: for the scripts beside this one."""

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
    """Where the package asks for CUDA by name: Kimi's adapter decodes there, some constructors ask which device it is."""
    decode = kimi_adapter.dequantize_int4
    kimi_adapter.dequantize_int4 = lambda *tensors, device: decode(*tensors, device="cpu")
    torch.cuda.current_device = lambda: 0


def without_code(directory):
    """A directory with the config.json of another, but for `auto_map`: it names files that a toy has not."""
    config = json.loads((Path(directory) / "config.json").read_text())
    config.pop("auto_map", None)
    copy = tempfile.mkdtemp()
    (Path(copy) / "config.json").write_text(json.dumps(config))
    return copy


def build(family, directory, adapter):
    """The family's model for a directory's config.json, with or without its state dict adapter; its weights say nothing."""
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
    # Qwen3-VL's constructor initializes weights, and asks for the current CUDA device to do so.
    with no_init_weights():
        return getattr(module, name).from_pretrained(str(directory), backend=backend)
