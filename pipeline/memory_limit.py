"""What running out of memory has taught: how many tokens run together. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.publish import output_errors, replace, temporary_file


class MemoryLimit:
    """The limit of one engine.

    Attributes:
        max_tokens: of rows that run together, padding included; None until memory has run out.
            Tokens and not rows, so that a few long rows do not make batches of short ones small.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        self.max_tokens = max_tokens

    def lower(self, max_tokens: int) -> None:
        """Takes note that more than so many are too many."""
        if self.max_tokens is None or max_tokens < self.max_tokens:
            self.max_tokens = max_tokens


class KeptMemoryLimit(MemoryLimit):
    """A limit that outlives its worker: one for each kind of device, in a file of the run folder.

    Who removes the file has the workers try again.

    Args:
        path: of the file; it need not exist.
        device: kind of the device, such as `NVIDIA H200`.
    """

    def __init__(self, path: Path, device: str) -> None:
        self._path = path
        self._device = device
        super().__init__(self._read().get(device))

    def lower(self, max_tokens: int) -> None:
        """Takes note, for the workers that come after too.

        Of two that write at the same time, one may be forgotten, until memory runs out again.

        Raises:
            OutputError: the file cannot be written.
        """
        super().lower(max_tokens)
        folder = self._path.parent
        with output_errors(folder), temporary_file(folder, self._path.name, ".tmp") as temporary:
            kept = self._read()
            kept[self._device] = min(max_tokens, kept.get(self._device, max_tokens))
            temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            replace(temporary, self._path)

    def _read(self) -> dict[str, int]:
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return {str(device): int(max_tokens) for device, max_tokens in kept.items()}
