"""Write the prompts of the quickstart job: questions that the model was never trained on.

python configs/quickstart/make_prompts.py
"""

import argparse
import random
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tasks import TASKS, held_out_examples

PROMPTS_PATH = Path(__file__).parent / "prompts"
NUM_FILES = 3
ROWS_PER_FILE = 240
ROWS_PER_GROUP = 60
SCHEMA = pa.schema(
    {"id": pa.int64(), "task": pa.string(), "question": pa.string(), "expected": pa.string()}
)


def build_table(seed: int) -> pa.Table:
    """All prompts, the tasks mixed so that short and long answers meet in a batch."""
    rows = held_out_examples(NUM_FILES * ROWS_PER_FILE // len(TASKS))
    random.Random(seed).shuffle(rows)
    return pa.Table.from_pylist(
        [{"id": number, **asdict(row)} for number, row in enumerate(rows)], schema=SCHEMA
    )


def main() -> None:
    """Cut the table into files of several row groups each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PROMPTS_PATH)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = build_table(options.seed)
    for index in range(NUM_FILES):
        part = table.slice(index * ROWS_PER_FILE, ROWS_PER_FILE)
        pq.write_table(
            part, options.out / f"prompts-{index}.parquet", row_group_size=ROWS_PER_GROUP
        )


if __name__ == "__main__":
    main()
