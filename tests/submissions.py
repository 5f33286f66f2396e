"""Submissions of a job that nobody runs, and the texts that may be in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from jobs.config import JobConfig
from jobs.schedulers.submission import Submission

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def make_job(**cluster: Any) -> JobConfig:
    """A job that nobody runs."""
    return JobConfig.model_validate(
        {
            "name": "Solve.It_2",
            "input": {"path": "/data/in.parquet"},
            "prompt": {"template": "{{ q }}"},
            "model": {"path": "/data/models/m"},
            "output": {"path": "/data/runs/out"},
            "cluster": cluster,
        }
    )


def make_submission(path: str = "/jobs/job.yaml", *overrides: str, **cluster: Any) -> Submission:
    """A submission of it."""
    return Submission(make_job(**cluster), Path(path), overrides)
