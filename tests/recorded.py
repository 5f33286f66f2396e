"""CUDA graphs as far as a CPU has them: the operations of a step, recorded and run again.

As with a graph, numbers and shapes that Python computed in the step are frozen, every tensor keeps
its address, and a step that looks at a value cannot be recorded. That it is the step's kernels that
are run again, in their order and on their memory, is what a GPU does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.stepping import Stepping

Result = TypeVar("Result")
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2")
"""Operations whose result the host waits for: their shapes or values decide what comes next."""


class Recorder(TorchDispatchMode):
    """Notes each operation with its arguments and its results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view:
            self.operations.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        """Runs the operations again; results come to where they were."""
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordedSteps:
    """A `Capture` for the CPU.

    Attributes:
        recorders: one for each step that was recorded.
        num_replays: of all of them.
    """

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []
        self.num_replays = 0

    def __call__(self, step: Callable[[], Result]) -> Callable[[], Result]:
        step()  # the warm-up; a step that is not the same each time would show
        recorder = Recorder()
        with recorder:
            result = step()
        self.recorders.append(recorder)

        def replay() -> Result:
            self.num_replays += 1
            recorder.replay()
            return result

        return replay


STEPPINGS = {
    "called": Stepping(),
    "called, behind": Stepping(reads_behind=True),
    "replayed, behind": Stepping(RecordedSteps, reads_behind=True),
}
"""What a CPU gets, a GPU where steps cannot be recorded, and a GPU."""
