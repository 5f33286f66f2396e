"""A job as a scheduler is to run it: a name, a command line, and what it asks for.

Knows no scheduler. The same job and run folder always get the same name, which is what makes a
submission that is sent twice harmless.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import JsonValue

from jobs.cluster_settings import ClusterSettings
from jobs.config import JobConfig, load_job

ROOT = Path(__file__).parents[2]
"""Where the packages are."""

_SLUG_CHARACTERS = 28
"""With prefix and digest 47: KubeRay's limit for the name of a RayJob."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What is to be run, and on what.

    Attributes:
        job_file: absolute.
        overrides: `a.b=value`, the value in YAML and ASCII; paths in them are absolute.
    """

    job: JobConfig
    job_file: Path
    overrides: tuple[str, ...]

    @property
    def cluster(self) -> ClusterSettings:
        """What the job file asks a scheduler for."""
        return self.job.cluster

    @property
    def name(self) -> str:
        """Of the job and its run folder; a label as Kubernetes, Slurm and Ray take it."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.job.name.lower())[:_SLUG_CHARACTERS].strip("-")
        digest = hashlib.sha256(self.job.output.path.encode()).hexdigest()[:8]
        return f"shardmill-{slug}-{digest}"

    @property
    def python(self) -> str:
        """The interpreter on nodes that see the same files as this machine."""
        return self.cluster.python or sys.executable

    @property
    def environment(self) -> dict[str, str]:
        """Variables for nodes that see the same files as this machine."""
        if self.cluster.python is not None:
            return self.cluster.env
        return {"PYTHONPATH": str(ROOT), **self.cluster.env}

    @property
    def local_paths(self) -> Iterator[tuple[str, str]]:
        """Files and folders of the job by setting; hub ids and URLs are none.

        In a loaded job a local path is whole, and a hub id never is.
        """
        job = self.job
        inputs = (job.input.path,) if isinstance(job.input.path, str) else job.input.path or ()
        adapters = job.model.adapter.named_paths.values() if job.model.adapter else ()
        for setting, paths in (
            ("input.path", inputs),
            ("input.dataset", (job.input.dataset or "",)),
            ("model.path", (job.model.path,)),
            ("model.adapter", adapters),
            ("output.path", (job.output.path,)),
        ):
            yield from ((setting, path) for path in paths if path.startswith("/"))

    @property
    def run_arguments(self) -> list[str]:
        """What follows `shardmill run`."""
        settings = [word for override in self.overrides for word in ("--set", override)]
        return [str(self.job_file), *settings]

    @property
    def command(self) -> list[str]:
        """The whole command line on nodes that see the same files as this machine."""
        # -P: a folder named `jobs` where the scheduler happens to start it is not ours.
        return [self.python, "-P", "-m", "jobs", "run", *self.run_arguments]


def prepare_submission(job_file: Path, overrides: Sequence[str]) -> Submission:
    """A job that is checked as far as it can be without its input and its model.

    Raises:
        JobFileError: with one line for every mistake.
    """
    job = load_job(job_file, overrides)
    values = job.model_dump(mode="json")
    # A run does not look at the cluster block.
    wanted = [override for override in overrides if not re.match(r"\s*cluster\b", override)]
    resolved = tuple(_resolved(override, values) for override in wanted)
    return Submission(job, job_file.absolute(), resolved)


def _resolved(override: str, values: dict[str, JsonValue]) -> str:
    """An override as it came out: a relative path means another file where a scheduler starts."""
    name, value = "", cast(JsonValue, values)
    for key in override.partition("=")[0].strip().split("."):
        if not isinstance(value, dict):
            break  # a block that is written as a word
        name, value = f"{name}.{key}".lstrip("."), value[key]
    text = json.dumps(value, ensure_ascii=False)
    # YAML knows JSON, but not its pairs of surrogates, nor characters that cannot be printed.
    text = re.sub("[^ -~]", lambda match: f"\\U{ord(match[0]):08X}", text)
    return f"{name}={text}"
