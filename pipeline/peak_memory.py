"""How much memory this process has taken, and that it takes no more than there is."""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress
from pathlib import Path

import torch

from pipeline.host_memory import host_memory, peak_host_bytes

STATUS = Path("/proc/self/status")
SPARED_SHARE = 0.05
"""Of the free memory of a machine without a GPU, what is left to others."""


def reset_peak(device: torch.device) -> None:
    """Begins to measure anew. Where a CPU's kernel cannot, peaks only grow."""
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
        return
    gc.collect()
    # What the allocator of glibc keeps for later is nobody's need.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """Most bytes since then: of torch on the GPUs, or resident of the whole process."""
    if device.type == "cuda":
        count = torch.cuda.device_count()
        return sum(torch.cuda.max_memory_allocated(index) for index in range(count))
    # Unlike `peak_host_bytes`, which only grows, this is what `reset_peak` resets.
    return _of_status("VmHWM") if STATUS.exists() else peak_host_bytes()


def die_first() -> None:
    """Has the system, should it run out of memory, kill this process and no other."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def stay_within_free_memory(device: torch.device) -> None:
    """Makes an allocation that a machine without a GPU has no room for fail, as on a GPU.

    Else the system would swap, and then kill. Only with the model loaded, as files that are mapped
    meanwhile count as if they were memory.
    """
    if device.type == "cuda" or not STATUS.exists():
        return
    limit = _of_status("VmData") + int(host_memory().available * (1 - SPARED_SHARE))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _of_status(name: str) -> int:
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"Linux tells {name} of every process")
