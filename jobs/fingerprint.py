"""What makes two jobs the same: everything that changes an answer, and nothing else.

Left out on purpose: paths, worker counts, batch sizes and failure limits. A job may go on under
other ones of these; under another fingerprint it may not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from jobs.config import JobConfig
from jobs.inputs import InputFile
from pipeline.checkpoint import Checkpoint
from pipeline.records import Sampling

Fields = dict[str, JsonValue]


def fingerprint_fields(
    job: JobConfig, files: Sequence[InputFile], checkpoint: Checkpoint, sampling: Sampling
) -> Fields:
    """The settings that change an answer, resolved, by the dotted name a user knows them by."""
    fields: Fields = {
        file_field(file.name): f"{file.num_rows} rows, {file.size} bytes, {file.digest}"
        for file in files
    }
    fields["output.prefix"] = job.output.prefix
    fields["output.columns"] = (
        None if job.output.columns is None else list[JsonValue](job.output.columns)
    )
    fields |= {f"prompt.{key}": value for key, value in job.prompt.model_dump().items()}
    fields |= {
        "model.revision": checkpoint.revision,
        "model.files": checkpoint.digest,
        "model.quantization": job.model.model_dump()["quantization"],
        "model.dtype": job.model.dtype,
        "model.trust_remote_code": job.model.trust_remote_code,
        "generation.num_samples": job.generation.num_samples,
        "generation.max_new_tokens": sampling.max_new_tokens,
        "generation.stop": list[JsonValue](sorted(sampling.stop)),
        "generation.stop_token_ids": list[JsonValue](sorted(sampling.stop_token_ids)),
        "generation.include_stop": sampling.include_stop,
        "generation.min_new_tokens": sampling.min_new_tokens,
        "generation.ignore_eos": sampling.ignore_eos,
        "generation.repetition_penalty": sampling.repetition_penalty,
        "generation.temperature": sampling.temperature,
    }
    if job.model.adapter is not None:
        fields |= {f"model.adapter[{part.name}]": part.digest for part in checkpoint.adapters}
        fields["model.adapter.merge"] = job.model.adapter.merge
        fields["model.adapter.column"] = job.model.adapter.column
    if sampling.temperature > 0:
        # Greedy decoding draws nothing, so these say nothing there.
        fields |= {
            "generation.top_k": sampling.top_k,
            "generation.top_p": sampling.top_p,
            "generation.min_p": sampling.min_p,
            "generation.seed": job.generation.seed,
        }
    return fields


def file_field(name: str) -> str:
    """By which field an input file is known."""
    return f"input.file.{name}"


def fingerprint(fields: Mapping[str, JsonValue]) -> str:
    """A hex digest of the fields."""
    canonical = json.dumps(fields, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
