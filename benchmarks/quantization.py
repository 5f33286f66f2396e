"""The quickstart job with every quantization: right answers, rate and memory, as a table.

    python -m benchmarks.quantization --rounds 2

Makes the quantized copies of the model first (see `quantized_models.py`) and runs whole jobs on
them, in turn. GPTQ and AWQ take part where gptqmodel is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pyarrow.dataset as ds

from benchmarks.quantized_models import CALIBRATED, KINDS

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart"
WHILE_LOADING = ("none", "int8", "nf4", "fp4", "torchao-int8", "torchao-fp8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        jobs = settings_of_jobs(Path(scratch), options.only)
        if not jobs:
            parser.error(
                f"--only knows {', '.join((*WHILE_LOADING, *KINDS))}; stored: 'KIND, stored'"
            )
        seen: dict[str, list[tuple[float, float, str]]] = {name: [] for name in jobs}
        for number in range(options.rounds):
            for name, settings in jobs.items():
                seen[name].append(run(Path(scratch) / f"{name}-{number}", settings))
                print(f"{name}: {seen[name][-1]}", file=sys.stderr)
    print("| | rows right | tokens/s | weights in memory, MiB |\n|---|---|---|---|")
    for name, results in seen.items():
        rights, rates, sizes = zip(*results, strict=True)
        right = " to ".join(dict.fromkeys(f"{share:.2%}" for share in sorted(rights)))
        print(f"| {name} | {right} | {statistics.median(rates):,.0f} | {sizes[0]} |")


def settings_of_jobs(scratch: Path, only: list[str] | None) -> dict[str, list[str]]:
    """Name -> what it sets; the copies of the model are made on the way."""
    jobs = {name: [f"model.quantization={name}"] for name in WHILE_LOADING}
    jobs["nf4, double"] = ["model.quantization={method: nf4, bnb_4bit_use_double_quant: true}"]
    for kind in KINDS:
        if kind in CALIBRATED and find_spec("gptqmodel") is None:
            continue
        if only is None or f"{kind}, stored" in only:
            make = [sys.executable, "-m", "benchmarks.quantized_models", QUICKSTART / "model"]
            make += [scratch, "--only", kind]
            # Not in the project's folder: gptqmodel writes logs where it is.
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            subprocess.run(make, cwd=scratch, env=environment, check=True, capture_output=True)
            files = [path.name for path in (scratch / kind).glob("*.gguf")]
            jobs[f"{kind}, stored"] = [f"model.path={scratch / kind}"]
            jobs[f"{kind}, stored"] += [f"model.gguf_file={name}" for name in files]
    return {name: settings for name, settings in jobs.items() if only is None or name in only}


def run(output: Path, settings: list[str]) -> tuple[float, float, str]:
    """One job: the share of right answers, tokens a second, and MiB of weights of a worker."""
    command = [sys.executable, "-m", "jobs", "run", str(QUICKSTART / "job.yaml"), "--json"]
    command += ["--output", str(output), *(f"--set={setting}" for setting in settings)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    table = ds.dataset(output, format="parquet").to_table().to_pydict()
    pairs = list(zip(table["completion"], table["expected"], strict=True))
    size = re.search(r"([\d.,]+) MiB on", done.stderr)
    assert size is not None, "each worker says what its weights take"
    right = sum(completion == expected for completion, expected in pairs) / len(pairs)
    return right, float(json.loads(done.stdout)["tokens_per_second"]), size[1]


if __name__ == "__main__":
    main()
