"""The arrows of docs/architecture.md: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jobs", "pipeline")
TORCH_FILES = {
    "pipeline/model.py",
    "pipeline/adapters.py",
    "pipeline/special_tokens.py",
    "pipeline/quantization.py",
    "pipeline/static_engine.py",
    "pipeline/continuous_engine.py",
    "pipeline/batch.py",
    "pipeline/cache_support.py",
    "pipeline/cuda_graph.py",
    "pipeline/decoder.py",
    "pipeline/fixed_cache.py",
    "pipeline/fixed_step.py",
    "pipeline/forward.py",
    "pipeline/padding.py",
    "pipeline/placement.py",
    "pipeline/prefill.py",
    "pipeline/probes.py",
    "pipeline/room.py",
    "pipeline/slot_layer.py",
    "pipeline/slots.py",
    "pipeline/attention.py",
    "pipeline/sampling.py",
    "pipeline/self_check.py",
    "pipeline/stepping.py",
    "pipeline/transfer.py",
    "pipeline/peak_memory.py",
    "pipeline/speed.py",
    "jobs/bench_service.py",  # in a process of its own
    "jobs/preview.py",  # asks for the GPU's memory; never imported by a run
}
STDLIB_ONLY = {
    "pipeline/records.py",
    "pipeline/errors.py",
    "pipeline/stopping.py",
    "pipeline/admission.py",
    "pipeline/folder.py",
    "pipeline/publish.py",
    "pipeline/bands.py",
    "pipeline/measured.py",
    "pipeline/agreement.py",
}
CLICK_FILES = {
    "jobs/cli.py",
    "jobs/bench_command.py",
    "jobs/job_options.py",
    "jobs/submit_command.py",
    "jobs/terminal.py",
}
RAY_FILES = {
    "jobs/cluster.py",
    "jobs/crew.py",
    "jobs/exporter.py",
    "jobs/nodes.py",
    "jobs/private_ray.py",
}


def _sources() -> list[str]:
    return sorted(
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    )


def _imported(source: str) -> Iterator[str]:
    """Every module that a file imports, inside functions and for type checking too."""
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{source}: relative imports hide arrows"
            yield node.module


def _packages(source: str) -> set[str]:
    return {name.partition(".")[0] for name in _imported(source)}


@pytest.mark.parametrize("source", [s for s in _sources() if s.startswith("pipeline/")])
def test_pipeline_does_not_look_back(source: str) -> None:
    """The data path can be used and tested without jobs, Ray or a command line."""
    assert not _packages(source) & {"jobs", "ray", "click"}


@pytest.mark.parametrize("source", _sources())
def test_heavy_libraries_stay_where_they_belong(source: str) -> None:
    """torch and transformers in the model's files, Ray in the cluster's, click in the CLI."""
    found = _packages(source)
    if source not in TORCH_FILES:
        assert not found & {"torch", "transformers", "bitsandbytes", "accelerate"}
    if source not in RAY_FILES:
        assert "ray" not in found
    if source not in CLICK_FILES:
        assert "click" not in found
    if source != "jobs/plot.py":
        assert "matplotlib" not in found


@pytest.mark.parametrize("source", sorted(STDLIB_ONLY))
def test_the_ground_floor_is_standard_library(source: str) -> None:
    """What everything imports imports nothing but the standard library and its like."""
    assert _packages(source) <= {*sys.stdlib_module_names, "pipeline"}
    ours = {name.replace(".", "/") + ".py" for name in _imported(source) if "pipeline" in name}
    assert ours <= STDLIB_ONLY


@pytest.mark.parametrize("source", [s for s in _sources() if s != "jobs/cli.py"])
def test_only_the_command_line_prints_and_exits(source: str) -> None:
    """A library that prints or exits cannot be trusted by those who call it."""
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"print", "exit", "quit", "sys.exit"}


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("jobs.cli", {"torch", "transformers", "ray", "pyarrow", "pydantic"}),
        ("jobs.run", {"torch", "transformers", "datasets"}),
        ("jobs.bench_command", {"torch", "pyarrow", "pydantic"}),
        ("jobs.bench_pages", {"torch", "transformers", "ray", "matplotlib"}),
        ("jobs.schedulers.known", {"torch", "transformers", "ray", "datasets"}),
    ],
)
def test_nothing_heavy_is_loaded_early(module: str, banned: set[str]) -> None:
    """`--help` is instant, and the driver never holds a copy of torch."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not banned & set(done.stdout.split())
