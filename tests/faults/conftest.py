"""What fault tests share, and what was killed in a session, told at its end."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.killer import Campaign


@dataclass
class Tally:
    """Counts over all campaigns.

    Attributes:
        kills: by what was killed.
        codes: by exit code of a run.
    """

    num_campaigns: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)

    def add(self, campaign: Campaign) -> None:
        """Takes a campaign in that has survived."""
        self.num_campaigns += 1
        self.kills += campaign.kills
        self.codes.update(campaign.codes)

    def __str__(self) -> str:
        kills = ", ".join(f"{what} {count}" for what, count in sorted(self.kills.items()))
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(self.codes.items()))
        return (
            f"{self.num_campaigns} jobs survived {self.kills.total()} kills ({kills}) in "
            f"{self.codes.total()} runs (by exit code {codes})"
        )


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short path: the names of Ray's sockets must fit in 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="sm-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


_TALLY = pytest.StashKey[Tally]()


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Tally:
    """Where campaigns are counted."""
    return pytestconfig.stash.setdefault(_TALLY, Tally())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """One line, for docs/reliability.md."""
    counted = config.stash.get(_TALLY, None)
    if counted is not None:
        terminalreporter.write_line(f"faults: {counted}")
