"""A `Checkpoint` -> a loaded `Model`: weights on the device, quantized if asked, and a tokenizer.

What a model's files say about generation is read here once and then taken off the model, so that
nothing of it can leak into an engine's calls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from pipeline.adapters import AdapterChooser, with_adapters
from pipeline.checkpoint import Checkpoint, quantization_name
from pipeline.errors import ModelError, ResourceError, ShardmillError, describe
from pipeline.host_memory import readable
from pipeline.outcome import MemoryPeak
from pipeline.placement import (
    check_memory,
    devices_of,
    is_spilled,
    peak_memory,
    place_names,
    placement_options,
    too_big,
)
from pipeline.quantization import num_weight_bytes, quantization_config, quiet_bitsandbytes
from pipeline.room import is_out_of_memory
from pipeline.settings import ModelSettings
from pipeline.special_tokens import eos_ids_of, pad_id_of, vocabulary_of
from pipeline.stopping import Vocabulary

logger = logging.getLogger(__name__)

NEUTRAL_VALUES: tuple[object, ...] = (None, False, 0, 1, [])
UNSUPPORTED_GENERATION = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beams",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "top_h",
    "typical_p",
)
"""What `generation_config.json` may ask for and is not done."""
PLACED_ELSEWHERE = "Some modules are dispatched on the CPU"
"""How transformers refuses to quantize what has no room on the GPUs."""


@dataclass(frozen=True)
class Model:
    """A model ready to generate.

    Attributes:
        device: where `input_ids` go.
        other_devices: further ones that layers run on.
        vocabulary: for stopping; its `eos_ids` come from the generation config and the tokenizer.
        num_embeddings: prompt token ids are below this.
        context_length: tokens of prompt and completion together; None if there is no limit.
        num_weight_bytes: memory of weights and buffers.
        peak: of this process's memory when it was loaded.
        notes: what a user should know about how it was loaded, a sentence each.
        chooser: where each row chooses its adapter; None if there is none, or one for all.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    vocabulary: Vocabulary
    pad_id: int
    num_embeddings: int
    context_length: int | None
    num_parameters: int
    num_weight_bytes: int
    dtype: torch.dtype
    quantization: str
    load_seconds: float
    other_devices: tuple[torch.device, ...] = ()
    peak: MemoryPeak = field(default_factory=MemoryPeak)
    notes: tuple[str, ...] = ()
    num_adapters: int = 0
    chooser: AdapterChooser | None = None

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a completion."""
        return self.vocabulary.eos_ids

    def prompt_room(self, max_new_tokens: int) -> int | None:
        """Most tokens of a prompt that leaves room for so many; None if there is no limit."""
        return None if self.context_length is None else self.context_length - max_new_tokens

    @property
    def device_name(self) -> str:
        """What kind of device it is on: `cpu`, or the GPU's name, and how many of them."""
        if self.device.type != "cuda":
            return self.device.type
        name, count = torch.cuda.get_device_name(self.device), len(self.devices)
        return f"{count} x {name}" if count > 1 else name

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where its layers run; the first is `device`."""
        return (self.device, *self.other_devices)

    @property
    def caller(self) -> Any:
        """What is called, or asked to `generate`, in place of `model`."""
        return self.model if self.chooser is None else self.chooser.model

    def adapter_options(self, adapters: Sequence[str]) -> dict[str, Any]:
        """What `caller` must be told for rows that have chosen these adapters."""
        return {} if self.chooser is None else self.chooser.options(adapters)

    @property
    def summary(self) -> str:
        """One line for the log."""
        kind = str(self.dtype).removeprefix("torch.")
        if self.quantization != "none":
            kind = f"{self.quantization} ({kind})"
        if self.num_adapters:
            kind = f"{kind}, {self.num_adapters} LoRA adapter{'s' * (self.num_adapters > 1)}"
        return (
            f"{type(self.model).__name__}, {self.num_parameters / 1e6:,.1f}M parameters, {kind}, "
            f"{self.num_weight_bytes / 2**20:,.0f} MiB on {place_names(self.model)}, "
            f"loaded in {self.load_seconds:.1f} s, {self._peaks}"
        )

    @property
    def _peaks(self) -> str:
        peaks = [f"cuda:{index} {readable(peak)}" for index, peak in enumerate(self.peak.gpus)]
        return f"peak memory {', '.join([readable(self.peak.host), *peaks])}"


def load_model(
    checkpoint: Checkpoint,
    settings: ModelSettings,
    num_threads: int | None = None,
    num_workers: int = 1,
) -> Model:
    """Loads a checkpoint onto the GPUs this process sees, or the CPU if it sees none.

    Args:
        checkpoint: from `fetch`.
        settings: those the checkpoint was fetched with.
        num_threads: of torch on the CPU; None leaves torch's choice.
        num_workers: that load it on this machine.

    Raises:
        ModelError: the files do not make a causal language model as the settings ask.
        ResourceError: it does not fit into the memory of the device.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    quiet_bitsandbytes()
    started = time.perf_counter()
    with _loading(checkpoint, settings):
        config = _load_config(checkpoint, settings)
        _check_causal(checkpoint, config)
        check_memory(checkpoint, settings, num_workers)
        model = _load_weights(checkpoint, settings, config, num_workers)
    model, chooser = with_adapters(model, checkpoint, settings)
    tokenizer = load_tokenizer(checkpoint, settings)
    with _loading(checkpoint, settings):
        loaded = _assemble(checkpoint, settings, model, tokenizer, time.perf_counter() - started)
    return replace(loaded, num_adapters=len(checkpoint.adapters), chooser=chooser)


def load_tokenizer(checkpoint: Checkpoint, settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer alone, padding on the left.

    Raises:
        ModelError: its files cannot be used.
    """
    options: dict[str, Any] = {}
    with _loading(checkpoint, settings):
        if settings.gguf_file is not None and checkpoint.has_tokenizer:
            # Told of the GGUF file, transformers would not look for a chat template beside it.
            options["config"] = _load_config(checkpoint, settings)
        elif settings.gguf_file is not None:
            options["gguf_file"] = settings.gguf_file
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint.folder, padding_side="left", **options, **_source_options(settings)
        )
    return tokenizer


def _load_config(checkpoint: Checkpoint, settings: ModelSettings) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(
        checkpoint.folder, gguf_file=settings.gguf_file, **_source_options(settings)
    )
    return config


@contextmanager
def _loading(checkpoint: Checkpoint, settings: ModelSettings) -> Iterator[None]:
    """Turns what the libraries raise over a model's files into a sentence."""
    try:
        yield
    except ShardmillError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or PLACED_ELSEWHERE in str(error):
            raise ResourceError(too_big(checkpoint, settings)) from error
        if settings.offload == "disk" and "offload_folder" in str(error):
            raise ModelError(
                f"model {checkpoint.source!r} does not hold its weights as they are used, so they "
                "cannot be read from its files at every step: set model.offload to cpu."
            ) from error
        # Broken files lead to anything: the tokenizers raise a bare Exception.
        raise ModelError(
            f"model {checkpoint.source!r} cannot be loaded: {describe(error)}"
        ) from error


def _source_options(settings: ModelSettings) -> dict[str, Any]:
    # An explicit False, as None would ask at the terminal; and code that a config names in
    # another repository is not fetched.
    return {"trust_remote_code": settings.trust_remote_code, "local_files_only": True}


def _check_causal(checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    architectures = list(getattr(config, "architectures", None) or [])
    is_masked = any(name.endswith("ForMaskedLM") for name in architectures)
    if getattr(config, "is_encoder_decoder", False) or is_masked:
        kind = "encoder-decoder" if not is_masked else "masked language"
        name = ", ".join(architectures) or config.model_type
        raise ModelError(
            f"model {checkpoint.source!r} is an {kind} model ({name}); a causal language model is "
            "needed, such as one of class …ForCausalLM."
        )


def _load_weights(
    checkpoint: Checkpoint, settings: ModelSettings, config: PretrainedConfig, num_workers: int
) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        config=config,
        dtype=settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype),
        use_safetensors=None if settings.allow_pickle else True,
        quantization_config=quantization_config(checkpoint, settings, config),
        gguf_file=settings.gguf_file,
        output_loading_info=True,
        **placement_options(settings, num_workers),
        **_source_options(settings),
    )
    model, info = loaded
    _check_complete(checkpoint, model, info["missing_keys"])
    if is_spilled(model, settings):
        raise ResourceError(too_big(checkpoint, settings))
    model.eval()
    return model  # type: ignore[no-any-return]


def _check_complete(checkpoint: Checkpoint, model: Any, missing_keys: Sequence[str]) -> None:
    if missing_keys:
        raise ModelError(
            f"model {checkpoint.source!r} lacks {len(missing_keys)} weights that "
            f"{type(model).__name__} needs ({min(missing_keys)} is one): it is incomplete or no "
            "causal language model."
        )
    if not model.can_generate():
        raise ModelError(
            f"model {checkpoint.source!r} is a {type(model).__name__}, which cannot generate."
        )


def _assemble(
    checkpoint: Checkpoint,
    settings: ModelSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    load_seconds: float,
) -> Model:
    device, *other_devices = devices_of(model)
    embeddings: Any = model.get_input_embeddings()
    num_embeddings = int(embeddings.weight.shape[0])
    eos_ids = _checked_ends(checkpoint, eos_ids_of(model.generation_config, tokenizer))
    pad_id, notes = pad_id_of(checkpoint.source, tokenizer, eos_ids, num_embeddings)
    notes += _unsupported(checkpoint)
    for note in notes:
        logger.info(note)
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    text_config = model.config.get_text_config()
    vocabulary_size = max(num_embeddings, len(tokenizer), getattr(text_config, "vocab_size", 0))
    return Model(
        model=model,
        tokenizer=tokenizer,
        device=device,
        vocabulary=vocabulary_of(tokenizer, vocabulary_size, eos_ids),
        pad_id=pad_id,
        num_embeddings=num_embeddings,
        context_length=checkpoint.context_length
        or getattr(text_config, "max_position_embeddings", None),
        num_parameters=_num_parameters(checkpoint, settings, model),
        num_weight_bytes=num_weight_bytes(model),
        dtype=model.dtype,
        quantization=quantization_name(checkpoint, settings),
        load_seconds=load_seconds,
        other_devices=tuple(other_devices),
        peak=peak_memory(),
        notes=tuple(notes),
    )


def _num_parameters(checkpoint: Checkpoint, settings: ModelSettings, model: PreTrainedModel) -> int:
    if checkpoint.quantization not in ("gptq", "awq"):
        return model.num_parameters()
    # Their packed weights are no parameters: those of the plain architecture are counted.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            model.config, trust_remote_code=settings.trust_remote_code
        )
    return int(plain.num_parameters())


def _checked_ends(checkpoint: Checkpoint, eos_ids: frozenset[int]) -> frozenset[int]:
    """Without negative ones, which stand for none.

    What is no number would never be met: each row would run to its limit.
    """
    wrong = [number for number in eos_ids if type(number) is not int]
    if wrong:
        raise ModelError(
            f"model {checkpoint.source!r} has end-of-sequence token {wrong[0]!r}: correct "
            "eos_token_id in its generation_config.json or config.json to a token id."
        )
    return frozenset(number for number in eos_ids if number >= 0)


def _unsupported(checkpoint: Checkpoint) -> list[str]:
    defaults = checkpoint.generation_defaults
    asked = [name for name in UNSUPPORTED_GENERATION if defaults.get(name) not in NEUTRAL_VALUES]
    if not asked:
        return []
    return [f"The model's generation_config.json asks for {', '.join(asked)}: not applied."]
