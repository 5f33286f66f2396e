"""A job held against the world: model, input and prompt fit together, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from pydantic import JsonValue

from jobs import __version__
from jobs.config import JobConfig
from jobs.fingerprint import fingerprint, fingerprint_fields
from jobs.inputs import Inputs, open_inputs, with_digests
from jobs.manifest import Manifest, PlannedFile, encode_schema
from jobs.plan import choose_shard_rows, choose_shards_per_part
from pipeline.checkpoint import Checkpoint, fetch
from pipeline.errors import JobFileError, ModelError
from pipeline.prompts import check_prompt
from pipeline.records import Sampling
from pipeline.stored import libraries_of
from pipeline.writer import output_schema

ANSWERING_LIBRARIES = ("torch", "transformers", "tokenizers", "bitsandbytes")
"""Another version of these may round, or cut a text into tokens, in another way."""


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A job that can run.

    Attributes:
        sampling: with the model's defaults filled in.
        passed_columns: input columns that are passed through, in the input's order.
        schema: of the output.
    """

    job: JobConfig
    checkpoint: Checkpoint
    inputs: Inputs
    sampling: Sampling
    passed_columns: tuple[str, ...]
    schema: pa.Schema

    @property
    def num_completions(self) -> int:
        """Output rows."""
        return self.inputs.num_rows * self.job.generation.num_samples

    def resolved(self) -> dict[str, JsonValue]:
        """The job file with every default filled in, the model's own included."""
        values: dict[str, Any] = self.job.model_dump(mode="json")
        values["model"] = self.checkpoint.pinned(self.job.model).model_dump(mode="json")
        values["input"]["revision"] = self.inputs.revision
        values["generation"] |= {
            name: getattr(self.sampling, name)
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        }
        return values

    def describe_generation(self) -> str:
        """How completions are generated, and which of it the model decided."""
        shown = ["max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"]
        if self.sampling.temperature == 0:
            shown = ["max_new_tokens", "repetition_penalty"]
        parts = ["sampling" if self.sampling.temperature else "greedy"]
        for name in shown:
            is_models = getattr(self.job.generation, name) is None
            source = " (from the model)" if is_models and name in self._model_says() else ""
            parts.append(f"{name} {getattr(self.sampling, name)}{source}")
        parts += [f"stop {stop!r}" for stop in self.sampling.stop]
        parts += [f"stop token {token}" for token in self.sampling.stop_token_ids]
        parts += [
            f"{name} {getattr(self.sampling, name)}"
            for name in ("include_stop", "min_new_tokens", "ignore_eos")
            if getattr(self.sampling, name)
        ]
        return ", ".join(parts)

    def _model_says(self) -> set[str]:
        said = self.checkpoint.generation_defaults
        return {name for name, value in said.items() if value is not None}

    def _libraries(self) -> tuple[str, ...]:
        optional = libraries_of(self.job.model, self.checkpoint.quantization)
        return (*ANSWERING_LIBRARIES, *optional)

    def manifest(self, known: Sequence[PlannedFile] = ()) -> Manifest:
        """What a run folder is started with.

        Args:
            known: files of the folder's own manifest, if it has one; files that have not been
                touched since are not read again.
        """
        files = with_digests(self.inputs.files, {file.path: file for file in known})
        fields = fingerprint_fields(self.job, files, self.checkpoint, self.sampling)
        shard_rows = choose_shard_rows(self.inputs.num_rows)
        return Manifest(
            shardmill_version=__version__,
            versions={name: version(name) for name in self._libraries()},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            job=self.resolved(),
            fingerprint=fingerprint(fields),
            fingerprint_fields=fields,
            files=tuple(
                PlannedFile(
                    name=file.name,
                    path=str(file.path),
                    size=file.size,
                    stamp=file.stamp,
                    digest=file.digest,
                    num_rows=file.num_rows,
                )
                for file in files
            ),
            output_schema=encode_schema(self.schema),
            output_prefix=self.job.output.prefix,
            num_samples=self.job.generation.num_samples,
            shard_rows=shard_rows,
            shards_per_part=choose_shards_per_part(shard_rows),
        )


def prepare_job(job: JobConfig, staging: Path) -> PreparedJob:
    """Checks all that can be checked without loading the model.

    Args:
        staging: folder for inputs that must be converted to Parquet; made when needed.

    Raises:
        ShardmillError: of the kind that fits, with the setting in its sentence.
    """
    checkpoint = fetch(job.model)
    if job.prompt.uses_chat_template and not checkpoint.has_chat_template:
        raise ModelError(
            f"model.path {job.model.path} has no chat template, which prompt.messages and "
            "prompt.chat_template need; use a chat model, or a plain prompt.template"
        )
    sampling = job.generation.resolve(checkpoint.generation_defaults)
    _check_room(job, checkpoint)
    _check_stop_tokens(job, checkpoint)
    inputs = open_inputs(job.input, Path("/"), staging)
    names = inputs.schema.names
    check_prompt(job.prompt, names)
    _check_adapter_column(job, names)
    return PreparedJob(
        job=job,
        checkpoint=checkpoint,
        inputs=inputs,
        sampling=sampling,
        passed_columns=_passed_columns(job, names),
        schema=output_schema(inputs.schema, job.output.prefix, job.output.columns),
    )


def _check_room(job: JobConfig, checkpoint: Checkpoint) -> None:
    most, context = job.generation.max_new_tokens, checkpoint.context_length
    if context is not None and most >= context:
        raise JobFileError(
            f"generation.max_new_tokens {most} leaves no room for a prompt: the model's context "
            f"is {context} tokens; lower it"
        )


def _check_stop_tokens(job: JobConfig, checkpoint: Checkpoint) -> None:
    size = checkpoint.config.get("vocab_size")
    unknown = [token for token in job.generation.stop_token_ids or () if size and token >= size]
    if unknown:
        raise JobFileError(
            f"generation.stop_token_ids has {unknown[0]}, which is no token of the model: it has "
            f"{size}, from 0 on"
        )


def _check_adapter_column(job: JobConfig, names: list[str]) -> None:
    column = None if job.model.adapter is None else job.model.adapter.column
    if column is not None and column not in names:
        raise JobFileError(
            f"model.adapter.column names '{column}', which the input does not have; it has "
            + ", ".join(names)
        )


def _passed_columns(job: JobConfig, names: list[str]) -> tuple[str, ...]:
    wanted = job.output.columns
    if wanted is None:
        return tuple(names)
    for name in wanted:
        if wanted.count(name) > 1:
            raise JobFileError(f"output.columns names '{name}' twice; name each column once")
        if name not in names:
            raise JobFileError(
                f"output.columns names '{name}', which the input does not have; it has "
                + ", ".join(names)
            )
    return tuple(name for name in names if name in wanted)


@contextmanager
def prepared_for_now(job: JobConfig) -> Iterator[PreparedJob]:
    """A prepared job that leaves nothing behind: what must be converted goes with the block."""
    with TemporaryDirectory(prefix="shardmill-") as staging:
        yield prepare_job(job, Path(staging))
