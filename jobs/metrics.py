"""`.shardmill/metrics.json`: what the workers of the present or the last run have done.

A file and not a service, since a short job ends between two scrapes of a monitor.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from pydantic import JsonValue

from jobs.progress import Snapshot, WorkerMetrics
from pipeline.errors import OutputError
from pipeline.folder import RunFolder
from pipeline.metrics import EngineMetrics
from pipeline.publish import output_errors, replace, temporary_file

logger = logging.getLogger(__name__)

INTERVAL = 10.0
"""Seconds between two writings of the file."""

Figures = dict[str, JsonValue]


class MetricsFile:
    """A `Reporter` that keeps the file up to date while a run goes on."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._written_at = time.monotonic()
        self._last: Snapshot | None = None

    def update(self, snapshot: Snapshot) -> None:
        """Writes the file if it is time.

        Raises:
            OutputError: the operating system refuses.
        """
        self._last = snapshot
        if time.monotonic() - self._written_at >= INTERVAL:
            self._written_at = time.monotonic()
            self._write(snapshot)

    def close(self) -> None:
        """Writes how the run ended; that it cannot be written is no reason to fail any more."""
        if self._last is not None:
            try:
                self._write(self._last)
            except OutputError as error:
                logger.warning("the metrics of this run are incomplete: %s", error)

    def _write(self, snapshot: Snapshot) -> None:
        content: Figures = {
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds_generating": round(snapshot.seconds_generating, 3),
            "job": figures(total(snapshot.workers)),
            "workers": [_of_worker(worker) for worker in snapshot.workers],
        }
        folder = self._folder
        with (
            output_errors(folder.root),
            temporary_file(folder.internal, folder.metrics.name, ".tmp") as temporary,
        ):
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            replace(temporary, folder.metrics)


def total(workers: Sequence[WorkerMetrics]) -> EngineMetrics:
    """Of all workers together; seconds are added up too."""
    return sum((worker.metrics for worker in workers), EngineMetrics())


def figures(metrics: EngineMetrics) -> Figures:
    """The counts and the shares that follow from them."""
    shares = {
        "slot_occupancy": metrics.slot_occupancy,
        "padding_share": metrics.padding_share,
    }
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in {**asdict(metrics), **shares}.items()
    }


def _of_worker(worker: WorkerMetrics) -> Figures:
    info = worker.info
    where: Figures = {}
    if info is not None:
        where = {
            "node": info.node,
            "devices": info.devices,
            "model": info.model,
            "self_check": info.self_check,
            "load_seconds": round(info.load_seconds, 3),
            "peak_host_bytes": worker.peak.host,
            "peak_gpu_bytes": list[JsonValue](worker.peak.gpus),
        }
    return {"worker": worker.worker, **where, **figures(worker.metrics)}
