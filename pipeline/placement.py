"""On which devices a model's weights go, and whether they fit, told before they are loaded."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.checkpoint import Checkpoint
from pipeline.errors import ResourceError
from pipeline.footprint import Footprint, estimate_footprint
from pipeline.host_memory import HostMemory, host_memory, peak_host_bytes, readable
from pipeline.outcome import MemoryPeak
from pipeline.settings import ModelSettings

CERTAIN_SHARE = 0.9
"""Of an estimate, which may count weights that the model does not use: what might fit is tried."""
OFFLOADED_SHARE = 0.75
"""Of free memory, for the weights of a model that is too large: keys and values need some too."""
SIGNS_OF_GPUS = (Path("/proc/driver/nvidia/gpus"), Path("/dev/kfd"))
"""What the drivers of NVIDIA and AMD make. Without either, Ray has been told of GPUs by hand."""
SPILLED = {"cpu", "disk"}
"""Where accelerate puts weights for which no GPU has room."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One that this process sees.

    Attributes:
        name: its number on the machine, or its UUID.
        free: bytes.
    """

    name: str
    free: int


def lacking_gpus(num_gpus: int, signs: Sequence[Path] = SIGNS_OF_GPUS) -> tuple[str, ...]:
    """What there is to say of GPUs that a worker was given and torch does not see.

    Args:
        signs: folders or files that are there where a machine has GPUs.

    Raises:
        ResourceError: the machine has GPUs, but torch cannot use as many as the worker was given.
    """
    num_seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_seen >= num_gpus:
        return ()
    lack = f"this worker was given {num_gpus} GPU(s) and torch {torch.__version__} sees {num_seen}"
    if any(sign.exists() for sign in signs):
        raise ResourceError(
            f"{lack} on {socket.gethostname()}: see what nvidia-smi (or rocm-smi) says there, and "
            "whether this torch is made for its driver; workers.gpus_per_worker 0 runs on CPUs."
        )
    return (f"{lack}, as the machine has none; it works on the CPU",)


def visible_gpus() -> list[Gpu]:
    """Those of this process, in torch's order."""
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(names) != count:
        names = [str(index) for index in range(count)]
    return [
        Gpu(name.strip(), torch.cuda.mem_get_info(index)[0]) for index, name in enumerate(names)
    ]


def check_memory(checkpoint: Checkpoint, settings: ModelSettings, num_workers: int) -> None:
    """Refuses a model whose weights clearly do not fit into the memory that there is.

    How much the keys and values of a row take depends on how long it gets, so they refuse none.

    Args:
        num_workers: on this machine.

    Raises:
        ResourceError: with what it needs and what there is; or there is no GPU to offload from.
    """
    gpus = visible_gpus()
    check_offload(settings, len(gpus))
    need = estimate_footprint(checkpoint, settings, has_gpu=bool(gpus))
    problem = shortage(need, num_workers, settings.offload, gpus, host_memory())
    if problem:
        raise ResourceError(f"model {checkpoint.source!r} {problem}.")


def check_offload(settings: ModelSettings, num_gpus: int) -> None:
    """Refuses to offload from GPUs that a worker does not have.

    Raises:
        ResourceError: with what to do instead.
    """
    if settings.offload == "cpu" and not num_gpus:
        raise ResourceError(
            "model.offload is cpu, which is for weights that a GPU has no room for, but this "
            "worker has no GPU: leave model.offload out, or give it one by workers.gpus_per_worker."
        )


def shortage(
    need: Footprint, num_workers: int, offload: str, gpus: Sequence[Gpu], host: HostMemory
) -> str | None:
    """Why a model cannot fit, as a clause; None if it may.

    Args:
        num_workers: on this machine, each with as many GPUs.
        offload: `model.offload`; with disk, everything fits.
    """
    if offload == "disk":
        return None
    takes_host = offload == "cpu" or not gpus
    on_gpus = sum(gpu.free for gpu in gpus)
    if need.weights * CERTAIN_SHARE > on_gpus + takes_host * host.available:
        there = [f"GPU {gpu.name} has {readable(gpu.free)} free" for gpu in gpus]
        there += [f"this machine has {readable(host.available)} free"] * takes_host
        return (
            f"needs about {readable(need.weights)} for its weights, but {' and '.join(there)}: "
            f"{_advice(gpus, offload, need.weights)}"
        )
    # The workers load at the same time, so what is free now does not tell what is free for each.
    num_copies = 1 if need.is_mapped and not gpus else num_workers
    together = num_copies * max(0, int(need.weights * CERTAIN_SHARE) - on_gpus)
    if takes_host and together > host.total:
        return (
            f"needs about {readable(together)} of this machine's memory in {num_workers} workers, "
            f"but it has {readable(host.total)}: lower workers.count, or set model.quantization"
        )
    return None


def too_big(checkpoint: Checkpoint, settings: ModelSettings) -> str:
    """The sentence for a model that has turned out not to fit."""
    gpus = visible_gpus()
    need = estimate_footprint(checkpoint, settings, has_gpu=bool(gpus))
    where = f"the memory of {len(gpus)} GPU(s)" if gpus else "this machine's memory"
    return (
        f"model {checkpoint.source!r} does not fit into {where} with about "
        f"{readable(need.weights)} of weights: {_advice(gpus, settings.offload)}."
    )


def _advice(gpus: Sequence[Gpu], offload: str, num_bytes: int = 0) -> str:
    if not gpus:
        return (
            "lower workers.count, or set model.quantization, or, of plain weights, model.offload "
            "to disk"
        )
    largest = max(1, *(gpu.free for gpu in gpus))
    wanted = max(len(gpus) + 1, -(-num_bytes // largest))
    slower = "disk" if offload == "cpu" else "cpu"
    return (
        f"set workers.gpus_per_worker to {wanted} or more, or model.quantization, or, of plain "
        f"weights, model.offload to {slower}"
    )


def placement_options(settings: ModelSettings, num_workers: int) -> dict[str, Any]:
    """What `from_pretrained` is told about devices.

    On several GPUs the layers are spread evenly, so that each has room for their keys and values.
    """
    gpus = visible_gpus()
    if settings.offload == "none":
        one = {"": torch.device("cuda:0" if gpus else "cpu")}
        return {"device_map": "auto" if len(gpus) > 1 else one}
    room: dict[int | str, int] = {
        index: int(gpu.free * OFFLOADED_SHARE) for index, gpu in enumerate(gpus)
    }
    room["cpu"] = int(host_memory().available * OFFLOADED_SHARE) // num_workers
    return {"device_map": "auto", "max_memory": room}


def is_spilled(model: PreTrainedModel, settings: ModelSettings) -> bool:
    """Whether weights lie where `model.offload` does not allow it."""
    if settings.offload == "disk":
        return False
    allows_cpu = settings.offload == "cpu" or not torch.cuda.is_available()
    return bool(_places(model) & (SPILLED - ({"cpu"} if allows_cpu else set())))


def devices_of(model: PreTrainedModel) -> tuple[torch.device, ...]:
    """Where layers run: GPUs in order, or the CPU. `input_ids` go to the first.

    What lies elsewhere comes to one of them for each step.
    """
    gpus = sorted(_places(model) - SPILLED, key=lambda name: (len(name), name))
    return tuple(map(torch.device, gpus or ["cpu"]))


def place_names(model: PreTrainedModel) -> str:
    """Where the weights lie, such as `cuda:0, cuda:1 and disk`."""
    *others, last = sorted(_places(model), key=lambda name: (name in SPILLED, len(name), name))
    return f"{', '.join(others)} and {last}" if others else last


def _places(model: PreTrainedModel) -> set[str]:
    """Devices as torch names them, and `disk`."""
    placed = getattr(model, "hf_device_map", None)  # set where there is more than one
    if placed is None:
        return {str(model.device)}
    return {f"cuda:{place}" if isinstance(place, int) else str(place) for place in placed.values()}


def peak_memory() -> MemoryPeak:
    """The most that this process has taken so far."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return MemoryPeak(peak_host_bytes(), tuple(map(torch.cuda.max_memory_allocated, gpus)))
