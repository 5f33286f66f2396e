"""The figures of a run for Prometheus, through the exporter that each node of a Ray cluster has.

By job and by worker, never by row or shard: a monitor keeps a series for every value of a tag.
What a job has done at its end may come between two scrapes; `metrics.json` has it.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from jobs.progress import Snapshot, WorkerMetrics

OF_JOB, OF_WORKER = ("run",), ("run", "worker")
"""Not `job`, which is Prometheus' own word for what it scrapes."""


class ClusterMetrics:
    """A `Reporter` that keeps the metrics of a Ray cluster up to date; Ray puts `ray_` in front.

    Args:
        job: its name in the job file.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._rows = _gauge("rows", "Output rows that there are to be.", OF_JOB)
        self._done = _gauge("rows_done", "Output rows committed, earlier runs included.", OF_JOB)
        self._failed = _gauge("rows_failed", "Of them, those that are errors.", OF_JOB)
        self._workers = _gauge("workers", "Workers whose model is loaded.", OF_JOB)
        self._occupancy = _gauge("slot_occupancy", "Share of slots with a row, 0 to 1.", OF_WORKER)
        self._counters = {
            "num_generated_tokens": _counter("generated_tokens", "Tokens generated."),
            "num_prefilled_tokens": _counter("prompt_tokens", "Prompt tokens worked through."),
            "num_put_back": _counter("rows_put_back", "Rows that lost their slot to longer ones."),
            "num_out_of_memory": _counter("out_of_memory", "Times that memory ran out."),
        }
        self._counted: dict[tuple[int, str], int] = {}

    def update(self, snapshot: Snapshot) -> None:
        """Hands the figures to Ray."""
        tags = {"run": self._job}
        self._rows.set(snapshot.num_rows, tags)
        self._done.set(snapshot.num_rows_done, tags)
        self._failed.set(snapshot.num_rows_failed, tags)
        self._workers.set(snapshot.num_workers, tags)
        for worker in snapshot.workers:
            self._update_worker(worker)

    def close(self) -> None:
        """Nobody works any more."""
        self._workers.set(0, {"run": self._job})

    def _update_worker(self, worker: WorkerMetrics) -> None:
        tags = {"run": self._job, "worker": str(worker.worker)}
        self._occupancy.set(worker.metrics.slot_occupancy, tags)
        for name, counter in self._counters.items():
            key, count = (worker.worker, name), getattr(worker.metrics, name)
            if count > self._counted.get(key, 0):
                counter.inc(count - self._counted.get(key, 0), tags)
                self._counted[key] = count


def _gauge(name: str, description: str, tags: tuple[str, ...]) -> Gauge:
    return Gauge(f"shardmill_{name}", description, tags)


def _counter(name: str, description: str) -> Counter:
    return Counter(f"shardmill_{name}", description, OF_WORKER)
