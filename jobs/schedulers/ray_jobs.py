"""A job as a Ray job, on a cluster that is running and sees the same files as this machine."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys

from jobs.schedulers.programs import attempt, call, checked
from jobs.schedulers.submission import Submission
from pipeline.errors import ResourceError

STOP_SECONDS = 90
"""What `ray job stop` waits before it kills: more than a run's grace time. Ray's own is 3 s."""

MOST_SUBMISSIONS = 100
"""Of one job to one cluster."""


def render(submission: Submission) -> str:
    """The command line of the first submission to a cluster."""
    return shlex.join(_submit(submission, 1)) + "\n"


def send(submission: Submission) -> str:
    """Submits the job, unless an earlier submission of it is at work.

    A submission id is taken for as long as the cluster lasts, so each submission has the next
    number, and only after the one before it has ended. Ray refuses all but one of several that
    try the same number.

    Raises:
        ResourceError: there is no such cluster, or it does not take the job.
    """
    for number in range(1, MOST_SUBMISSIONS + 1):
        identity = _identity(submission, number)
        done = attempt(_submit(submission, number))
        if done.returncode == 0:
            return f"submitted as {identity}; follow it with: ray job logs --follow {identity}"
        if "already exists" not in done.stdout + done.stderr:
            checked(done)
        status = call([*_ray(), "job", "status", *_address(submission), identity])
        if f"Status for job '{identity}'" in status:  # what Ray says of one that has not ended
            return f"{identity} is there already and has not ended; nothing was sent"
    raise ResourceError(
        f"the cluster has {MOST_SUBMISSIONS} submissions of this job already; look at the last one "
        f"with: ray job logs {identity}"
    )


def _submit(submission: Submission, number: int) -> list[str]:
    variables = {**submission.environment, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    walltime = submission.cluster.walltime
    return [
        *(*_ray(), "job", "submit", "--no-wait", *_address(submission)),
        *("--submission-id", _identity(submission, number)),
        *("--runtime-env-json", json.dumps({"env_vars": variables})),
        *("--", *submission.command),
        *(("--max-walltime", walltime) if walltime else ()),
    ]


def _identity(submission: Submission, number: int) -> str:
    return f"{submission.name}-{number}"


def _address(submission: Submission) -> list[str]:
    address = submission.cluster.ray.address
    return [] if address is None else ["--address", address]


def _ray() -> list[str]:
    """Of the Ray that Shardmill runs on, wherever the PATH leads.

    Raises:
        ResourceError: there is none.
    """
    if importlib.util.find_spec("ray") is None:
        raise ResourceError(
            f"--to ray needs Ray in the environment of {sys.executable}, where it is missing; "
            "install it there with: pip install 'ray[default]'"
        )
    return [sys.executable, "-P", "-m", "ray.scripts.scripts"]
