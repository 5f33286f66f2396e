"""The job file's `cluster` block: what a scheduler is asked for. It changes no answer."""

from __future__ import annotations

import re
from typing import Annotated
from zoneinfo import available_timezones

from pydantic import Field, field_validator

from jobs.cron_schedule import parse_schedule
from jobs.durations import parse_duration
from pipeline.block import Settings

_SLURM_NAME = re.compile(r"[a-z][a-z0-9-]*")
_SLURM_VALUE = re.compile(r"[!-~]+")
_SLURM_QUOTES = frozenset("'\"\\#")
_SLURM_OURS = {
    "time": "cluster.walltime",
    "nodes": "cluster.nodes",
    "gpus-per-node": "cluster.gpus_per_node",
    "cpus-per-task": "cluster.cpus_per_node",
    "mem": "cluster.memory",
    "job-name": "name",
}
"""Options of sbatch that follow from these settings."""

_SLURM_FIXED = frozenset(
    (
        *("array", "dependency", "open-mode", "signal", "wrap"),
        *("ntasks", "ntasks-per-node", "requeue", "no-requeue"),
    )
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LABEL = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"


class RaySettings(Settings):
    """A Ray cluster that is running."""

    address: str | None = Field(
        default=None,
        description="URL of its dashboard, such as http://head:8265; left out, what "
        "RAY_API_SERVER_ADDRESS says.",
    )


class KuberaySettings(Settings):
    """Pods on Kubernetes."""

    image: Annotated[str, Field(min_length=1)] = Field(
        description="Container image with Shardmill, and Ray as here."
    )
    namespace: Annotated[str, Field(pattern=_LABEL, max_length=63)] = Field(
        default="default", description="Namespace."
    )
    volume_claim: Annotated[str, Field(pattern=_LABEL, max_length=253)] | None = Field(
        default=None,
        description="PersistentVolumeClaim that holds input and output; every node writes to it.",
    )
    mount_path: Annotated[str, Field(pattern="^/[^:]+$")] = Field(
        default="/data", description="Where the claim is mounted; the job's paths lie below."
    )
    secret: Annotated[str, Field(pattern=_LABEL, max_length=253)] | None = Field(
        default=None,
        description="Secret whose keys become environment variables, such as HF_TOKEN.",
    )
    time_zone: str | None = Field(
        default=None,
        description="Time zone of a CronJob's schedule, such as Europe/Berlin; left out, that of "
        "Kubernetes' controller, mostly UTC.",
    )

    @field_validator("time_zone")
    @classmethod
    def _is_time_zone(cls, value: str | None) -> str | None:
        if value is None:
            return None
        known = available_timezones()  # none, where this machine has no list of them
        if known and value not in known:
            raise ValueError(f"has no zone '{value}': give a name such as Europe/Berlin or UTC")
        return value


class ClusterSettings(Settings):
    """What `shardmill submit` asks a scheduler for; `shardmill run` does not look at it."""

    nodes: Annotated[int, Field(ge=1)] = Field(default=1, description="Machines.")
    gpus_per_node: Annotated[int, Field(ge=0)] = Field(
        default=1, description="GPUs of each machine."
    )
    cpus_per_node: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="CPU cores of each machine; left out, the scheduler's default."
    )
    memory: Annotated[str, Field(pattern="^[1-9][0-9]*[MGT]$")] | None = Field(
        default=None,
        description="Memory of each machine, such as 64G; left out, the scheduler's default.",
    )
    walltime: str | None = Field(
        default=None,
        description="Longest time of one start, such as 8h; under Slurm the job is stopped before "
        "it is over, and queued again.",
    )
    schedule: str | None = Field(
        default=None,
        description="cron, kuberay: when to start, as the five fields of a crontab; with kuberay "
        "a Kubernetes CronJob of one node is made instead of a RayJob.",
    )
    env: dict[str, str] = Field(
        default={},
        description="Environment variables of the run. They are no place for secrets: scripts, "
        "manifests and Ray's dashboard show them.",
    )
    python: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Python that has Shardmill, as the nodes see it; left out, the one that "
        "submits, and python with kuberay.",
    )
    slurm: dict[str, str | int | bool] = Field(
        default={},
        description="slurm: further options of sbatch by their long names, such as partition, "
        "account or constraint; true for those without a value.",
    )
    ray: RaySettings = Field(default=RaySettings(), description="ray: where the cluster is.")
    kuberay: KuberaySettings | None = Field(
        default=None, description="kuberay: image, namespace and volume of the pods."
    )

    @field_validator("walltime")
    @classmethod
    def _is_duration(cls, value: str | None) -> str | None:
        try:
            is_longer = value is None or parse_duration(value) > 0
        except ValueError:
            is_longer = False
        if not is_longer:
            raise ValueError(f"must be a duration such as 45m, 8h or 1h30m, got '{value}'")
        return value

    @field_validator("schedule")
    @classmethod
    def _is_schedule(cls, value: str | None) -> str | None:
        return None if value is None else parse_schedule(value)

    @field_validator("env")
    @classmethod
    def _are_variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not _VARIABLE.fullmatch(name) or "\0" in text:
                raise ValueError(f"'{name}' is no environment variable: give letters, digits and _")
        return value

    @field_validator("slurm")
    @classmethod
    def _are_options(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name, setting in value.items():
            text = str(setting)
            if not _SLURM_NAME.fullmatch(name):
                raise ValueError(f"'{name}' is no long name of an sbatch option such as partition")
            if name in _SLURM_OURS:
                raise ValueError(f"cannot take {name}: set {_SLURM_OURS[name]} instead")
            if name in _SLURM_FIXED:
                raise ValueError(f"cannot take {name}: the script settles it itself")
            if not _SLURM_VALUE.fullmatch(text) or _SLURM_QUOTES & set(text):
                raise ValueError(f"cannot take {name}: '{text}' has a space, quote, \\ or # in it")
        return value
