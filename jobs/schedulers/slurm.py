"""A job as an sbatch script that queues itself again until it is complete."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from jobs.durations import parse_duration
from jobs.schedulers.programs import call
from jobs.schedulers.submission import Submission

NOTICE = 180
"""Seconds before the end of the wall time at which the run is told to stop, at most."""

MOST_FAILURES = 5
"""In a row, after each of which a job is queued again: its node or its network may be to blame."""

_TEMPLATE = Path(__file__).with_name("slurm.sh.j2")


def render(submission: Submission) -> str:
    """The script."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["sh"] = shlex.quote
    cpus = submission.cluster.cpus_per_node
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        options=list(_options(submission)),
        environment=submission.environment,
        command=submission.command,
        python=submission.python,
        num_nodes=submission.cluster.nodes,
        step_options="" if cpus is None else f"--cpus-per-task={cpus}",
        most_failures=MOST_FAILURES,
    )


def send(submission: Submission) -> str:
    """Hands the script to sbatch.

    Raises:
        ResourceError: sbatch is missing or does not take it.
    """
    return call(["sbatch"], render(submission)).strip()


def _options(submission: Submission) -> Iterator[str]:
    """What stands in the #SBATCH lines; none of it holds a space or a quote."""
    cluster = submission.cluster
    notice = NOTICE
    yield f"--job-name={submission.name}"
    yield "--dependency=singleton"  # sent twice, the second waits, and finds the job complete
    yield f"--nodes={cluster.nodes}"
    yield "--ntasks-per-node=1"
    if cluster.gpus_per_node:
        yield f"--gpus-per-node={cluster.gpus_per_node}"
    if cluster.cpus_per_node is not None:
        yield f"--cpus-per-task={cluster.cpus_per_node}"
    if cluster.memory is not None:
        yield f"--mem={cluster.memory}"
    if cluster.walltime is not None:
        minutes = math.ceil(parse_duration(cluster.walltime) / 60)
        notice = min(NOTICE, minutes * 30)
        yield f"--time={minutes}"
    yield f"--signal=B:USR1@{notice}"
    yield "--requeue"
    yield "--open-mode=append"
    yield "--output=%x-%j.log"
    for name, value in cluster.slurm.items():
        if value is not False:
            yield f"--{name}" if value is True else f"--{name}={value}"
