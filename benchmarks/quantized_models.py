"""Quantized copies of a small Llama, one for each way that checkpoints are stored.

    python -m benchmarks.quantized_models configs/quickstart/model runs/quantized

GPTQ and AWQ are calibrated on the texts of `--prompts`. Each kind runs in a process of its own,
since some of their libraries change what others do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TorchAoConfig,
)

GROUP_SIZE = 32
FP8_BLOCK = 128


def save_bitsandbytes_int8(source: Path, folder: Path) -> None:
    """LLM.int8, saved by transformers."""
    _save_quantized(source, folder, BitsAndBytesConfig(load_in_8bit=True))


def save_bitsandbytes_nf4(source: Path, folder: Path) -> None:
    """nf4 with double quantization, saved by transformers."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    _save_quantized(source, folder, config)


def save_torchao(source: Path, folder: Path) -> None:
    """torchao's int8 weights, saved by transformers."""
    from torchao.quantization import Int8WeightOnlyConfig

    _save_quantized(source, folder, TorchAoConfig(Int8WeightOnlyConfig()))


def _save_quantized(source: Path, folder: Path, config: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map={"": torch.device("cpu")}
    )
    model.save_pretrained(folder)
    copy_tokenizer(source, folder)


def save_gguf(source: Path, folder: Path, *, kind: str = "Q8_0", tokenizer: bool = False) -> None:
    """A GGUF file as llama.cpp writes it of a Llama; `kind` is a type of its.

    Args:
        tokenizer: write a byte-level tokenizer into it too, and no files beside it.
    """
    import gguf

    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(source)
    writer = gguf.GGUFWriter(folder / f"model-{kind}.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, special in (("bos", config.bos_token_id), ("eos", config.eos_token_id)):
        if special is not None:
            getattr(writer, f"add_{name}_token_id")(special)
    if tokenizer:
        _add_tokenizer(writer, source)
    else:
        copy_tokenizer(source, folder)
    _add_tensors(writer, source, config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, source: Path) -> None:
    import gguf

    tokenizer = AutoTokenizer.from_pretrained(source)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_types([kinds.CONTROL if n in special else kinds.NORMAL for n in names])
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_tensors(writer: Any, source: Path, config: Any, kind: str) -> None:
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, tensor in load_file(source / "model.safetensors").items():
        data = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            data = _interleaved(data, heads)
        new = names.get_name(name, try_suffixes=(".weight",))
        if data.ndim == 1 or kind == "F32":
            writer.add_tensor(new, data)
        else:
            writer.add_tensor(new, gguf.quantize(data, quantized), raw_dtype=quantized)


def _interleaved(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rotary pairs side by side, as llama.cpp wants them, and not in two halves of a head."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def save_compressed_tensors(source: Path, folder: Path) -> None:
    """Four-bit weights in groups, packed, as llm-compressor saves them."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(source)
    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP_SIZE, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            groups = module.weight.detach().unflatten(-1, (-1, GROUP_SIZE))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
            module.weight_scale.data, module.weight_zero_point.data = scale, zero
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    copy_tokenizer(source, folder)


def save_fp8(source: Path, folder: Path) -> None:
    """FP8 weights with a scale for each block, as DeepSeek and Qwen publish them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        rows, columns = (-(-size // FP8_BLOCK) for size in tensor.shape)
        blocks = tensor.float().reshape(rows, FP8_BLOCK, columns, FP8_BLOCK)
        scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        tensors[name] = (blocks / scale).reshape(tensor.shape).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    copy_tokenizer(source, folder)


def save_gptq(source: Path, folder: Path, prompts: Sequence[str] = ()) -> None:
    """GPTQ in four bits, by gptqmodel."""
    _save_by_gptqmodel(source, folder, prompts, torch.float32)


def save_awq(source: Path, folder: Path, prompts: Sequence[str] = ()) -> None:
    """AWQ in four bits, by gptqmodel; on CPU it packs in half precision only."""
    _save_by_gptqmodel(
        source, folder, prompts, torch.float16, quant_method="awq", format="gemm", sym=False
    )


def _save_by_gptqmodel(
    source: Path, folder: Path, prompts: Sequence[str], dtype: torch.dtype, **options: Any
) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=GROUP_SIZE, **options)
    model = GPTQModel.load(str(source), config, device="cpu", dtype=dtype)
    backend = BACKEND.AWQ_TORCH if "quant_method" in options else BACKEND.AUTO
    model.quantize(list(prompts), batch_size=8, backend=backend)
    model.save(str(folder))
    copy_tokenizer(source, folder)  # its generation_config.json would ask for sampling


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's and the generation's files, as they are."""
    for pattern in ("token*.json", "*.jinja", "generation_config.json"):
        for path in source.glob(pattern):
            shutil.copy(path, folder / path.name)


KINDS: dict[str, Callable[..., None]] = {
    "bitsandbytes-int8": save_bitsandbytes_int8,
    "bitsandbytes-nf4": save_bitsandbytes_nf4,
    "torchao": save_torchao,
    "gguf": save_gguf,
    "compressed-tensors": save_compressed_tensors,
    "fp8": save_fp8,
    "gptq": save_gptq,
    "awq": save_awq,
}
CALIBRATED = ("gptq", "awq")


def _read_prompts(paths: Sequence[Path], num_prompts: int = 128) -> list[str]:
    """Questions with their answers, as the quickstart's model was trained on them."""
    import pyarrow.parquet as pq

    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    return [
        f"<|user|>{row['question']}<|end|><|assistant|>{row['expected']}<|end|>"
        for row in rows[:: max(1, len(rows) // num_prompts)]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--prompts", type=Path, nargs="+")
    options = parser.parse_args()
    if len(options.only) > 1:
        rest = [str(path) for path in options.prompts or ()]
        for kind in options.only:
            command = [sys.executable, "-m", "benchmarks.quantized_models"]
            command += [str(options.source), str(options.output), "--only", kind]
            subprocess.run(command + (["--prompts", *rest] if rest else []), check=True)
        return
    (kind,) = options.only
    folder = options.output / kind
    prompts = options.prompts or sorted((options.source.parent / "prompts").glob("*.parquet"))
    extra = {"prompts": _read_prompts(prompts)} if kind in CALIBRATED else {}
    KINDS[kind](options.source, folder, **extra)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS)
    print(f"{kind}: {folder}, {size / 2**20:.2f} MiB of weights")


WEIGHTS = (".safetensors", ".gguf")

if __name__ == "__main__":
    main()
