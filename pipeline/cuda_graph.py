"""A step on a GPU, recorded once and replayed in a single launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")


class Capture(Protocol[Result]):
    """Makes a step one that can be replayed."""

    def __call__(self, step: Callable[[], Result]) -> Callable[[], Result]:
        """Records a step.

        Args:
            step: uses only tensors that stay where they are, and may be run several times.

        Returns:
            does the same again, with what is in those tensors then. It gives the same tensors
            each time, which hold until it, or another step of the same capture, is replayed.

        Raises:
            Exception: the step cannot be recorded.
        """


class CudaGraphs:
    """Records CUDA graphs. They share their memory, as they are replayed one after the other.

    Args:
        stream: where steps are recorded; each stream that is used so keeps memory of its own.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Result]) -> Callable[[], Result]:
        """See `Capture`."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            graph, result = self._record(step)
        finally:
            current.wait_stream(self._stream)

        def replay() -> Result:
            graph.replay()
            return result

        return replay

    def _record(self, step: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        # This also leaves the stream when the recording fails, where `graph` alone would not.
        with torch.cuda.stream(self._stream):
            step()  # libraries make their workspaces and choose their kernels
            with _waiting_forbidden():
                step()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU in the meantime.
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                result = step()
        return graph, result


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """Has torch raise where the host waits for the GPU, as a step that does cannot be recorded.

    To find that out while recording leaves the allocator of torch before 2.12 unusable.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that not every wait is found
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
