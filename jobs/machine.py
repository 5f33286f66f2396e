"""Where and with what something was measured: figures mean nothing without."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from jobs import __version__
from jobs.prepare import ANSWERING_LIBRARIES
from pipeline.cgroups import num_cores


@dataclass(frozen=True, slots=True)
class Surroundings:
    """This machine, the libraries and the time.

    Attributes:
        num_cores: that this process may use.
        memory_bytes: of the machine, GPUs apart.
        load_average: of the last minute; near the number of cores, the machine had other work.
        versions: by name.
        date: in UTC, to the minute.
    """

    cpu: str
    num_cores: int
    memory_bytes: int
    load_average: float
    system: str
    versions: dict[str, str]
    date: str


def surroundings() -> Surroundings:
    """As they are now."""
    return Surroundings(
        cpu=_cpu(),
        num_cores=num_cores(),
        memory_bytes=psutil.virtual_memory().total,
        load_average=os.getloadavg()[0],
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        versions={"shardmill": __version__, **{n: version(n) for n in ANSWERING_LIBRARIES}},
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _cpu() -> str:
    """The name that the processor has for people, where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
