"""What Ray, reading and writing cost: a whole job against its engine alone.

    python -m benchmarks.through_ray --prompts questions.jsonl --column question

The same model of 47M random parameters, the same prompts, one worker; alternating. The rate of the
job counts from the moment its worker is ready to the end of the last commit, as `run` prints it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from benchmarks.random_model import make_random_llama
from pipeline.checkpoint import fetch
from pipeline.engine import build_engine
from pipeline.model import load_model
from pipeline.prompts import PromptRenderer
from pipeline.records import Request, RequestId, Sampling
from pipeline.settings import EngineSettings, ModelSettings, PromptSettings

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = "Question: {{ text }}\nAnswer:"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL file")
    parser.add_argument("--column", default="question", help="the prompt's column")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    lines = options.prompts.read_text(encoding="utf-8").splitlines()[: options.rows]
    texts = [json.loads(line)[options.column] for line in lines]
    alone: list[float] = []
    whole: list[float] = []
    with tempfile.TemporaryDirectory(prefix="shardmill-") as scratch:
        job = _write_job(Path(scratch), texts, options.max_new_tokens)
        model = Path(scratch) / "model"
        for number in range(options.rounds):
            alone.append(_engine_alone(model, texts, options.max_new_tokens))
            whole.append(_whole_job(job, Path(scratch) / f"out-{number}"))
            print(f"  engine {alone[-1]:7.0f}   job {whole[-1]:7.0f} tokens/s", flush=True)
    ratio = statistics.median(whole) / statistics.median(alone)
    print(f"{len(texts)} rows: the job has {ratio:.3f} of its engine's rate (median)")


def _write_job(scratch: Path, texts: list[str], max_new_tokens: int) -> Path:
    rows = scratch / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    job = {
        "name": "through-ray",
        "input": {"path": str(rows)},
        "prompt": {"template": TEMPLATE},
        "model": {"path": str(make_random_llama(scratch / "model", texts))},
        "generation": {"max_new_tokens": max_new_tokens, "ignore_eos": True},
        "output": {"path": "out"},
        "workers": {"count": 1},
    }
    path = scratch / "job.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def _engine_alone(path: Path, texts: list[str], max_new_tokens: int) -> float:
    settings = ModelSettings(path=str(path))
    model = load_model(fetch(settings), settings, num_threads=torch.get_num_threads())
    renderer = PromptRenderer(PromptSettings(template=TEMPLATE), model.tokenizer)
    sampling = Sampling(max_new_tokens, ignore_eos=True)
    prompts = renderer.encode([{"text": text} for text in texts])
    engine = build_engine(model, EngineSettings())
    started = time.perf_counter()
    engine.add(
        [
            Request(RequestId(0, row, 0), tuple(ids), sampling)
            for row, ids in enumerate(prompts)
            if isinstance(ids, list)
        ]
    )
    num_tokens = 0
    while engine.num_waiting + engine.num_running:
        num_tokens += sum(done.num_completion_tokens for done in engine.step())
    return num_tokens / (time.perf_counter() - started)


def _whole_job(job: Path, output: Path) -> float:
    command = [sys.executable, "-m", "jobs", "run", str(job), "--output", str(output), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["work"]["tokens_per_second"])


if __name__ == "__main__":
    main()
