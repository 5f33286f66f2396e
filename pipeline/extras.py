"""Packages that only some models or commands need: an optional extra of this project for each."""

from __future__ import annotations

from importlib.util import find_spec

from pipeline.errors import ModelError

EXTRAS = {
    "adapters": ("peft",),
    "bench": ("matplotlib",),
    "compressed-tensors": ("compressed_tensors",),
    "gguf": ("gguf",),
    "gptq": ("gptqmodel", "optimum"),
    "torchao": ("torchao",),
}
"""Extra -> the modules that it brings, as pyproject.toml has them."""


def require(extra: str, what: str) -> None:
    """Checks that an extra is installed, without importing it.

    Args:
        what: needs it; the beginning of a sentence.

    Raises:
        ModelError: it is not, with the command that installs it.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{what} needs {' and '.join(missing)}, which this environment lacks: "
            f"pip install 'shardmill[{extra}]'."
        )
