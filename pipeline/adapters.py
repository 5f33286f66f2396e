"""LoRA adapters on a loaded model: one for all rows, or several that rows choose from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from pipeline.adapter_files import AdapterFiles
from pipeline.checkpoint import Checkpoint
from pipeline.errors import ModelError, ResourceError, ShardmillError, describe
from pipeline.room import is_out_of_memory
from pipeline.settings import ModelSettings

NO_ADAPTER = "__base__"
"""peft's name for the model itself."""
MIXING_MODULES = ("peft.tuners.lora.layer", "peft.tuners.lora.bnb")
"""Where those layers are defined that can give each row of a batch another adapter."""


@dataclass(frozen=True)
class AdapterChooser:
    """A model of whose rows each may have another adapter.

    Attributes:
        model: takes what the plain model takes, and `adapter_names`.
        keys: name in the rows -> name in peft, where not every character may stand.
    """

    model: Any
    keys: Mapping[str, str]

    def options(self, adapters: Sequence[str]) -> dict[str, Any]:
        """For a call with one row for each of these names; an empty one is the model itself."""
        return {"adapter_names": [self.keys.get(name, NO_ADAPTER) for name in adapters]}


def with_adapters(
    model: PreTrainedModel, checkpoint: Checkpoint, settings: ModelSettings
) -> tuple[PreTrainedModel, AdapterChooser | None]:
    """Puts the adapters of a job onto its model, which is changed.

    Returns:
        the model, and how rows choose, if they do.

    Raises:
        ModelError: an adapter is not one of this model, or cannot be used as asked.
    """
    if settings.adapter is None:
        return model, None
    keys = {adapter.name: f"adapter{n}" for n, adapter in enumerate(checkpoint.adapters)}
    wrapped: Any = None
    for adapter in checkpoint.adapters:
        with _fitting(adapter, checkpoint):
            wrapped = _add(wrapped, model, adapter, keys[adapter.name])
    wrapped.eval()
    if settings.adapter.merge:
        with _fitting(checkpoint.adapters[0], checkpoint):
            return wrapped.merge_and_unload(), None
    if settings.adapter.paths is None:
        return model, None
    _check_mixing(wrapped, checkpoint)
    return model, AdapterChooser(wrapped, keys)


def _add(wrapped: Any, model: PreTrainedModel, adapter: AdapterFiles, key: str) -> Any:
    # Importing it takes a second, and few jobs have adapters.
    from peft import LoraConfig, PeftModel

    config = LoraConfig.from_pretrained(str(adapter.folder))
    config.inference_mode = True
    if wrapped is None:
        wrapped = PeftModel(model, config, adapter_name=key)
    else:
        wrapped.add_adapter(key, config)
    result = wrapped.load_adapter(adapter.folder, key, torch_device=str(model.device))
    # peft leaves such weights at nothing, or drops them, with a warning at most.
    strange = [*result.missing_keys, *result.unexpected_keys]
    if strange:
        raise ValueError(
            f"{len(strange)} of its weights are missing or have no place ({min(strange)} is one)"
        )
    return wrapped


@contextmanager
def _fitting(adapter: AdapterFiles, checkpoint: Checkpoint) -> Iterator[None]:
    """Turns what peft raises over an adapter that does not fit into a sentence."""
    try:
        yield
    except ShardmillError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise ResourceError(
                f"model.adapter {adapter.source!r} does not fit into memory beside its model: "
                "lower workers.count, or set model.quantization."
            ) from error
        base = f" (it was trained on {adapter.base!r})" if adapter.base else ""
        raise ModelError(
            f"model.adapter {adapter.source!r} does not go with model {checkpoint.source!r}{base}: "
            f"{describe(error)}"
        ) from error


def _check_mixing(wrapped: Any, checkpoint: Checkpoint) -> None:
    """Refuses layers and adapters of which a batch can hold only one kind."""
    for adapter, config in zip(checkpoint.adapters, wrapped.peft_config.values(), strict=True):
        special = [name for name in ("use_dora", "modules_to_save") if getattr(config, name)]
        if special:
            raise ModelError(
                f"model.adapter {adapter.source!r} has {special[0]}, which works only with an "
                "adapter for all rows: give it alone as model.adapter.path."
            )
    for module in wrapped.modules():
        if hasattr(module, "lora_A") and type(module).forward.__module__ not in MIXING_MODULES:
            raise ModelError(
                f"model.adapter has several adapters, which layers of the kind "
                f"{type(module).__name__} cannot have in one batch: give one as "
                "model.adapter.path, or take the model unquantized or with bitsandbytes."
            )
