"""What is said of a job of which more rows have failed than it allows."""

from __future__ import annotations


def too_many_failed(num_failed: int, max_failed: int) -> str:
    """Both numbers, and what to do."""
    return (
        f"{num_failed:,} rows ended in an error and failure.max_failed_rows allows {max_failed:,}; "
        "raise that and run the same command to keep them as they are (`shardmill retry` runs them "
        "again later), or mend the cause, which the column `error` tells, and start over with "
        "--fresh"
    )
