"""Fixtures for every test. What imports torch is imported inside them: few tests need it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.fake_machine import Machine

if TYPE_CHECKING:
    from pipeline.model import Model


pytest_plugins = ("tests.faults.tally",)


def pytest_configure(config: pytest.Config) -> None:
    """The quick set tries the same examples each time; the long set looks for new ones."""
    if hasattr(config, "workerinput"):
        # One of several processes: OpenMP's threads spin, and would take each other's cores.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    settings.register_profile("quick", derandomize=True, deadline=None)
    settings.register_profile("faults", print_blob=True, deadline=None)
    settings.load_profile("faults" if config.getoption("markexpr") == "faults" else "quick")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 400 tokens, 128 positions and a chat template; not to be changed."""
    from tests.models import make_llama

    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2, likewise."""
    from tests.models import make_gpt2

    return make_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> Model:
    """`llama_folder`, loaded; not to be changed."""
    from tests.models import load

    return load(llama_folder)


@pytest.fixture(scope="session")
def gpt2(gpt2_folder: Path) -> Model:
    """`gpt2_folder`, loaded; not to be changed."""
    from tests.models import load

    return load(gpt2_folder)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine without any Python yet; what was started there and still runs is killed."""
    machine = Machine(tmp_path)
    yield machine
    for process in machine.started:
        if process.returncode is None:
            machine.kill(process)
