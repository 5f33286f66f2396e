"""The job file: YAML and `--set` overrides in, one frozen `JobConfig` out.

Paths in a job file are relative to that file, paths on the command line to the current folder;
a loaded `JobConfig` holds absolute ones only.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from jobs.cluster_settings import ClusterSettings
from jobs.inputs import InputSettings
from pipeline.errors import JobFileError
from pipeline.settings import (
    EngineSettings,
    GenerationSettings,
    ModelSettings,
    PromptSettings,
    Settings,
)


class OutputSettings(Settings):
    """Where the completions go, and beside which columns."""

    path: str = Field(description="The run folder; made when missing.")
    prefix: str = Field(
        default="", description="Put before the name of every column that Shardmill adds."
    )
    columns: tuple[str, ...] | None = Field(
        default=None,
        strict=False,
        description="Input columns that are passed through; all of them when left out.",
    )


class WorkersSettings(Settings):
    """How many workers, and what each is given."""

    count: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="Workers; auto fills the machine or the cluster."
    )
    gpus_per_worker: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="GPUs of one worker, over which its model is spread; auto is 1 where there are "
        "GPUs, else 0.",
    )


class FailureSettings(Settings):
    """What is put up with before the job stops."""

    max_failed_rows: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1,
        description="Rows that may end in an error, as a whole number or as a share of all rows "
        "(0.1, 1.0; rounded up); with more the job stops with exit code 65.",
    )
    stall_timeout: Annotated[float, Field(gt=0)] = Field(
        default=600.0,
        description="Seconds without a new token after which a worker is taken for stuck and "
        "replaced.",
    )

    def allowed(self, num_rows: int) -> int:
        """How many of `num_rows` may fail."""
        if isinstance(self.max_failed_rows, int):
            return self.max_failed_rows
        return math.ceil(self.max_failed_rows * num_rows)


class JobConfig(Settings):
    """A job: which prompts, through which model, into which folder."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="Name of the job: letters, digits, '.', '_' and '-'."
    )
    input: InputSettings
    prompt: PromptSettings
    model: ModelSettings
    generation: GenerationSettings = GenerationSettings()
    engine: EngineSettings = EngineSettings()
    output: OutputSettings
    workers: WorkersSettings = WorkersSettings()
    failure: FailureSettings = FailureSettings()
    cluster: ClusterSettings = ClusterSettings()


def load_job(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Reads a job file and puts the overrides in.

    Args:
        path: the YAML file.
        overrides: `a.b=value` each, the value in YAML; a later one wins.

    Raises:
        JobFileError: with one line for every mistake.
    """
    values = _read_yaml(path)
    _make_paths_absolute(values, path.absolute().parent)
    return build_job(values, overrides, path)


def build_job(values: dict[str, Any], overrides: Sequence[str], source: Path) -> JobConfig:
    """The job that these blocks of settings and overrides make.

    Args:
        values: changed in place; paths in it are absolute.
        overrides: see `load_job`.
        source: where the values are from, for messages.

    Raises:
        JobFileError: with one line for every mistake.
    """
    for override in overrides:
        _apply(values, override)
    try:
        return JobConfig.model_validate(values)
    except ValidationError as error:
        raise JobFileError("\n".join(_sentences(source, error))) from None


def job_schema() -> dict[str, Any]:
    """The job file's JSON Schema."""
    return JobConfig.model_json_schema()


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one block, where YAML would quietly take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                continue  # SafeLoader says what is wrong with it
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key '{key}' stands there twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise JobFileError(f"{path}: cannot read the job file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise JobFileError(f"{path}: the job file is not UTF-8 text") from None
    try:
        # A subclass of SafeLoader: no tag can build an arbitrary object.
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise JobFileError(f"{path}: not valid YAML: {_flat(error)}") from None
    if not isinstance(values, dict):
        raise JobFileError(
            f"{path}: a job file is a YAML mapping with the keys {_known(JobConfig)}"
        )
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Sets one `a.b=value`, making the blocks on its way."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise JobFileError(f"--set {override}: must look like block.setting=value")
    value = _typed(name.strip(), text)
    patch: dict[str, Any] = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        patch = {key: patch}
    _make_paths_absolute(patch, Path.cwd())
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise JobFileError(f"--set {override}: '{key}' is no block of settings")
        patch = patch[key]
    values.update(patch)


def _typed(name: str, text: str) -> object:
    """The value of a `--set`: YAML, or the text itself where it cannot be YAML or must be text.

    So `input.path=*.parquet` and `prompt.template={{ q }}` need no second pair of quotes.
    """
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return text
    field = dict(_all_settings(JobConfig)).get(name)
    is_text = field is not None and field.annotation in (str, str | None)
    return text if is_text and not isinstance(value, (str, NoneType)) else value


def _make_paths_absolute(values: dict[str, Any], base: Path) -> None:
    """Turns the relative paths of a raw job into absolute ones, wherever they are well-formed."""

    def absolute(text: object) -> object:
        if not isinstance(text, str) or "://" in text:
            return text
        return os.path.abspath(base / Path(text).expanduser())

    def folder_if_there(text: object) -> object:
        """A hub id looks like a relative path; a folder of that name comes first."""
        if not isinstance(text, str):
            return text
        is_path = text.startswith((".", "/", "~")) or os.path.exists(base / text)
        return absolute(text) if is_path else text

    for block, key, change in (
        ("input", "path", absolute),
        ("input", "dataset", folder_if_there),
        ("model", "path", folder_if_there),
        ("model", "adapter", folder_if_there),
        ("output", "path", absolute),
    ):
        settings = values.get(block)
        if isinstance(settings, dict) and key in settings:
            settings[key] = _changed(settings[key], change)


def _changed(value: object, change: Callable[[object], object]) -> object:
    """A path changed, or those in a list, or those that a block has as `path` and `paths`."""
    if isinstance(value, list):
        return [change(part) for part in value]
    if not isinstance(value, dict):
        return change(value)
    changed = {key: change(part) if key == "path" else part for key, part in value.items()}
    if isinstance(value.get("paths"), dict):
        changed["paths"] = {name: change(part) for name, part in value["paths"].items()}
    return changed


def _sentences(path: Path, error: ValidationError) -> Iterator[str]:
    """One line for each setting that is wrong, however many types pydantic tried for it."""
    by_setting: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        by_setting.setdefault(_setting_name(detail["loc"]), []).append(detail)
    for setting, details in by_setting.items():
        yield f"{path}: {_sentence(setting, details)}"


def _setting_name(location: tuple[int | str, ...]) -> str:
    """`a.b` or `a.b[2]`, without the names of union members that pydantic appends."""
    name = ""
    model: type[BaseModel] | None = JobConfig
    for key in location:
        if isinstance(key, int):
            name += f"[{key}]"
        elif model is not None:
            name = f"{name}.{key}" if name else key
            field = model.model_fields.get(key)
            annotation = field.annotation if field else None
            model = _block_of(annotation)
    return name if name.isprintable() else repr(name)[1:-1]  # one line, whatever is in a key


def _block_of(annotation: object) -> type[BaseModel] | None:
    """The block that a setting is, or may be."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _sentence(setting: str, details: list[Any]) -> str:
    first = details[0]
    if first["type"] == "extra_forbidden":
        return _unknown(setting)
    if first["type"] == "missing":
        return f"'{setting}' is missing"
    if first["type"] == "value_error":
        return f"'{setting}' {first['ctx']['error']!s}"
    wishes = dict.fromkeys(_wish(detail) for detail in details)
    wish = " or ".join(wishes).replace(" or be ", " or ")
    return f"'{setting}' must {wish}, got {_short(first['input'])}"


def _wish(detail: Mapping[str, Any]) -> str:
    """Pydantic's 'Input should be a valid integer' as 'be a valid integer'."""
    if detail["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return "be a block of settings"
    wish = str(detail["msg"]).partition(" should ")[2] or str(detail["msg"])
    return wish.replace("a valid tuple", "a list").replace(" after validation", "")


def _unknown(setting: str) -> str:
    """Names the nearest setting: one of the same block first, then any of the whole job file."""
    block, _, key = setting.rpartition(".")
    known = dict(_all_settings(JobConfig))
    siblings = [name for name in known if name.rpartition(".")[0] == block]
    keys = [name.rpartition(".")[2] for name in siblings]
    near = [
        siblings[keys.index(match)]
        for match in difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    ] or [name for name in known if name.rpartition(".")[2] == key]
    if not near:
        leaves = {name.rpartition(".")[2]: name for name in known}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(key, leaves, n=1, cutoff=0.75)]
    if near:
        return f"there is no setting '{setting}'; did you mean '{near[0]}'?"
    top_level = [name for name in known if "." not in name]
    return f"there is no setting '{setting}'; known there: {', '.join(siblings or top_level)}"


def _all_settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        block = _block_of(field.annotation)
        if block is not None:
            yield from _all_settings(block, f"{prefix}{name}.")


def _known(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
