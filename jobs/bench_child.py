"""The process in which `bench` measures one model: `python -m jobs.bench_child DESCRIPTOR`."""

from __future__ import annotations

import logging
import sys

from jobs.isolated import serve
from jobs.logs import terminal_handler


def main() -> None:
    """Answers the questions that come through the pipe, until it is closed."""
    logging.getLogger().addHandler(terminal_handler(sys.stderr, logging.WARNING))
    # Only now: libraries warn while they are imported, of what nobody uses.
    from jobs.bench_service import open_service
    from pipeline.peak_memory import die_first

    die_first()
    serve(int(sys.argv[1]), open_service)


if __name__ == "__main__":
    main()
