"""Whom a job can be handed to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from jobs.schedulers import crontab, kubernetes, ray_jobs, slurm
from jobs.schedulers.submission import Submission


class Scheduler(Protocol):
    """A module that knows one."""

    def render(self, submission: Submission) -> str:
        """The submission as a text that can be sent by hand."""

    def send(self, submission: Submission) -> str:
        """Sends it, and says what came of it."""


SCHEDULERS: Mapping[str, Scheduler] = {
    "slurm": slurm,
    "ray": ray_jobs,
    "kuberay": kubernetes,
    "cron": crontab,
}
