"""A GGUF file's header, without torch: what the model is, and that the file is whole."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Of the tensors, where the file does not say."""
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Type of a value -> its format in `struct`."""
STRING, ARRAY = 8, 9
CONFIG = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
"""Names of a `config.json` -> those of GGUF."""
BLOCKS = {
    1: {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2},
    32: {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 20: 18},
    256: {10: 84, 11: 110, 12: 144, 13: 176, 14: 210}
    | {16: 66, 17: 74, 18: 98, 19: 50, 21: 110, 22: 82, 23: 136, 29: 56},
}
"""Weights of a block -> type of a tensor, `Q…` or `IQ…` where it is more than one -> its bytes."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        metadata: of arrays only the length.
        num_weights: of all tensors.
    """

    path: Path
    metadata: Mapping[str, Any]
    num_weights: int

    @property
    def config(self) -> dict[str, Any]:
        """Its sizes under the names of a `config.json`, where it has one for all layers."""
        architecture = self.metadata.get("general.architecture")
        sizes = {
            name: self.metadata.get(f"{architecture}.{theirs}") for name, theirs in CONFIG.items()
        }
        return {name: size for name, size in sizes.items() if size is not None}

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer can be made of it."""
        return "tokenizer.ggml.tokens" in self.metadata

    @property
    def has_chat_template(self) -> bool:
        """Whether that has a chat template."""
        return "tokenizer.chat_template" in self.metadata


def read_header(path: Path) -> GgufHeader:
    """Reads and checks a file's header; of the weights it only looks where they end.

    Raises:
        ModelError: it is no GGUF file, of another version, or cut short.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError) as error:
        raise ModelError(f"{path} is not a whole GGUF file: copy or download it again.") from error


def _read(path: Path, file: BinaryIO) -> GgufHeader:
    if file.read(4) != MAGIC:
        raise ModelError(f"{path} is not a GGUF file: copy or download it again.")
    version, num_tensors, num_values = _unpack(file, "IQQ")
    if version not in VERSIONS:
        raise ModelError(
            f"{path} has version {version} of the GGUF format, and only versions 2 and 3 can be "
            "read: convert the model again."
        )
    metadata = {_string(file): _value(file, *_unpack(file, "I")) for _ in range(num_values)}
    if metadata.get("split.count", 1) > 1:
        raise ModelError(
            f"{path} is one of {metadata['split.count']} files of a model: put them together with "
            "`llama-gguf-split --merge`."
        )
    tensors = list(_tensors(file, num_tensors))
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    start = -(-file.tell() // alignment) * alignment
    expected = max((start + end for _, end in tensors), default=start)
    if path.stat().st_size < expected:
        raise ModelError(
            f"{path} has {path.stat().st_size} bytes where its header asks for {expected}: copy or "
            "download it again."
        )
    return GgufHeader(path, metadata, sum(size for size, _ in tensors))


def _tensors(file: BinaryIO, num_tensors: int) -> Iterator[tuple[int, int]]:
    """Of each tensor its number of weights, and where it ends in the part of the tensors."""
    for _ in range(num_tensors):
        _string(file)
        (num_dimensions,) = _unpack(file, "I")
        size = math.prod(_unpack(file, f"{num_dimensions}Q"))
        kind, offset = _unpack(file, "IQ")
        weights = next((weights for weights, kinds in BLOCKS.items() if kind in kinds), None)
        if weights is None:
            raise KeyError(kind)
        yield size, offset + size // weights * BLOCKS[weights][kind]


def _value(file: BinaryIO, kind: int) -> Any:
    """A value of the header; None for a list, which is passed over."""
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _unpack(file, NUMBERS[kind])[0]
    of, length = _unpack(file, "IQ")
    if of == STRING:
        for _ in range(length):
            file.seek(_unpack(file, "Q")[0], 1)
    else:
        file.seek(length * struct.calcsize(f"<{NUMBERS[of]}"), 1)
    return None


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    return _exactly(file, length).decode()


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", _exactly(file, struct.calcsize(f"<{form}")))


def _exactly(file: BinaryIO, length: int) -> bytes:
    content = file.read(length)
    if len(content) != length:
        raise struct.error("the file ends too early")
    return content
