"""A plugin of pytest that counts what was killed in a session, and tells it at the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
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

    def merge(self, num_campaigns: int, kills: dict[str, int], codes: dict[int, int]) -> None:
        """Takes in what another process has counted."""
        self.num_campaigns += num_campaigns
        self.kills.update(kills)
        self.codes.update(codes)

    def __str__(self) -> str:
        kills = ", ".join(f"{what} {count}" for what, count in sorted(self.kills.items()))
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(self.codes.items()))
        return (
            f"{self.num_campaigns} jobs survived {self.kills.total()} kills ({kills}) in "
            f"{self.codes.total()} runs (by exit code {codes})"
        )


_TALLY = pytest.StashKey[Tally]()
_REPORTED = "tally"


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Tally:
    """Where campaigns are counted."""
    return _of(pytestconfig)


def _of(config: pytest.Config) -> Tally:
    return config.stash.setdefault(_TALLY, Tally())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist reports to the one that prints."""
    counted = _of(session.config)
    if hasattr(session.config, "workeroutput"):
        report = (counted.num_campaigns, dict(counted.kills), dict(counted.codes))
        session.config.workeroutput[_REPORTED] = report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes in such a report; a process that has crashed sends none."""
    _of(node.config).merge(*getattr(node, "workeroutput", {}).get(_REPORTED, (0, {}, {})))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """One line, for docs/reliability.md."""
    counted = _of(config)
    if counted.num_campaigns:
        terminalreporter.write_line(f"faults: {counted}")
