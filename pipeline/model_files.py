"""The files of a model folder: which are loaded, whether they are whole, and their digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
SMALL_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
"""Files that say how a model is to be used: all of each goes into the digest."""

NUM_DIGEST_CHUNKS = 512
MIN_FILE_CHUNKS = 8
CHUNK_BYTES = 16 * 1024
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""


def has_weights(folder: Path, name: str) -> bool:
    """Whether there are weights of this kind, in one file or by an index of several."""
    return (folder / name).is_file() or (folder / f"{name}.index.json").is_file()


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load, in its order of preference; [] if there are none.

    GGUF files are not among them: it loads one only when told its name.

    Raises:
        ModelError: an index names files that are not there.
    """
    for name in (SAFETENSORS, PICKLE):
        if (folder / name).is_file():
            return [folder / name]
        index = read_json(folder / f"{name}.index.json")
        if index:
            return _indexed_files(folder / f"{name}.index.json", index)
    return []


def small_files(folder: Path) -> list[Path]:
    """The files of a model that are not weights and may decide an answer."""
    paths = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return sorted(path for path in paths if path.suffix in SMALL_SUFFIXES and path.is_file())


def digest(folder: Path, small_files: Sequence[Path], weights: Sequence[Path]) -> str:
    """Names a model or adapter by its content, in hexadecimal, not reading all of the weights.

    Small files count in full; of each weight file its size, its header and chunks of
    `CHUNK_BYTES` spread evenly over it.
    """
    total = hashlib.sha256()
    for path in small_files:
        content = path.read_bytes()
        total.update(f"{path.relative_to(folder)} {len(content)}\n".encode())
        total.update(content)
    num_chunks = max(MIN_FILE_CHUNKS, NUM_DIGEST_CHUNKS // max(1, len(weights)))
    for path in weights:
        total.update(f"{path.name} {path.stat().st_size}\n".encode())
        for chunk in _chunks(path, num_chunks):
            total.update(chunk)
    return total.hexdigest()


def read_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of each tensor in a safetensors file its type, such as `F16`, and its shape.

    Raises:
        ModelError: the file is cut short or is something else.
    """
    try:
        header = json.loads(_header(path)[8:])
        entries = {name: entry for name, entry in header.items() if name[:2] != "__"}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        tensors = {
            name: (str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file: copy or download it again."
        ) from error
    expected = len(_header(path)) + max(ends, default=0)
    if path.stat().st_size != expected:
        raise ModelError(
            f"{path} has {path.stat().st_size} bytes where its header asks for {expected}: copy or "
            "download it again."
        )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{path} is not JSON ({error}): copy or download the model again."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object: copy or download the model again.")
    return content


def _indexed_files(path: Path, index: Mapping[str, Any]) -> list[Path]:
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{path} has no weight_map: copy or download it again.")
    files = [path.parent / str(name) for name in sorted(set(names.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ModelError(
            f"{path} names {len(files)} weight files, and {len(absent)} of them are not there "
            f"({absent[0]} is the first): copy or download the model again."
        )
    return files


def _header(path: Path) -> bytes:
    """The length field and the header of a safetensors file, as far as they are there."""
    with path.open("rb") as file:
        start = file.read(8)
        num_bytes = int.from_bytes(start, "little")
        return start + file.read(min(num_bytes, MAX_HEADER_BYTES))


def _chunks(path: Path, num_chunks: int) -> Iterator[bytes]:
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        yield _header(path)
    with path.open("rb") as file:
        for number in range(num_chunks):
            file.seek(max(0, size - CHUNK_BYTES) * number // (num_chunks - 1))
            yield file.read(CHUNK_BYTES)
