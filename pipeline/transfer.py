"""Numbers between host and device, without either waiting for the other.

A copy from ordinary memory to a GPU waits for all that the GPU has still to do; one from or to
pinned memory takes its place in the queue.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(
    values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """The values as a tensor there; without a type, the one that torch takes for them."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Readback:
    """Whole numbers on their way to the host.

    Args:
        values: (any number,) int64; may be overwritten by what is launched later.
    """

    def __init__(self, values: Tensor) -> None:
        self._host = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        self._arrival: torch.cuda.Event | None = None
        if values.is_cuda:
            self._arrival = torch.cuda.current_stream(values.device).record_event()

    def read(self) -> list[int]:
        """The numbers; waits until they are there."""
        if self._arrival is not None:
            self._arrival.synchronize()
        numbers: list[int] = self._host.tolist()
        return numbers
