"""run_job.sh and run_tests.sh, with fake Pythons on PATH: no network, nothing is installed.

The scripts run in a copy of the project whose path has a space in it, without HOME and with
nothing on PATH but the tools they may rely on, as under cron.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
TOOLS = ["bash", "cat", "dirname", "find", "grep", "head", "ls", "mkdir", "mv", "readlink", "rm"]
TOOLS += ["sed", "tail"]
FAKES_TOOLS = ["ln", "sleep", "touch"]

# Plays a Python, its venv and pip modules and the job; notes pip's calls and the job's arguments.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *version_info*) echo "{version} {has_venv}" ;;
  *lock_descriptor.py*) exec "{real_python}" "$@" ;;
  *missing_requirements.py*) echo "{missing}" ;;
  *find_spec*) exit 0 ;;
  *"-m venv"*) mkdir -p "${{@: -1}}/bin"; ln -sf "$0" "${{@: -1}}/bin/python" ;;
  *"-m pip"*) echo "$*" >>"{notes}/pip"; {pip} ;;
  *"-m jobs"*) printf '%s\\n' "$$" "$PWD" "$@" >"{notes}/job"; {job} ;;
  *) echo "$*" >>"{notes}/checks"; {check} ;;
esac
"""


@dataclass
class Machine:
    """A copy of the project, and a PATH on which only the fakes are found."""

    folder: Path
    project: Path = field(init=False)
    bin: Path = field(init=False)
    notes: Path = field(init=False)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.project, self.bin, self.notes = (
            self.folder / name for name in ("the project", "bin", "notes")
        )
        for folder in (self.project, self.bin, self.notes):
            folder.mkdir()
        for name in ("run_job.sh", "run_tests.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.project)
        for path in ROOT.glob("requirements*.txt"):
            shutil.copy(path, self.project)
        shutil.copytree(ROOT / "scripts", self.project / "scripts")
        for tool in TOOLS + FAKES_TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)

    def add_python(self, name: str = "python3", **behaviour: str) -> Path:
        settings = {
            "version": "3 12 1",
            "has_venv": "1",
            "missing": "",
            "pip": "exit 0",
            "job": "exit 0",
            "check": "exit 0",
            "real_python": sys.executable,
            "notes": str(self.notes),
        }
        path = self.bin / name
        path.write_text(FAKE_PYTHON.format(**settings | behaviour))
        path.chmod(0o755)
        return path

    def start(
        self, *arguments: str | Path, cwd: Path | None = None, **env: str | Path
    ) -> subprocess.Popen[str]:
        command, *rest = arguments or ("run_job.sh", "job.yaml")
        process = subprocess.Popen(
            [self.project / command, *rest],
            cwd=cwd or self.folder,
            env={"PATH": str(self.bin)} | {name: str(value) for name, value in env.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def kill(self, process: subprocess.Popen[str]) -> None:
        """Kill a start with all its children, if any is left, and wait for it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def run(
        self, *arguments: str | Path, cwd: Path | None = None, **env: str | Path
    ) -> tuple[int, str]:
        """Run a script to its end: its exit code, and what it said on stderr."""
        process = self.start(*arguments, cwd=cwd, **env)
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors

    def stamps(self) -> list[str]:
        return sorted(path.stem for path in self.project.glob(".venv/shardmill/*.stamp"))

    def pip_calls(self) -> list[str]:
        path = self.notes / "pip"
        return path.read_text().splitlines() if path.exists() else []

    def job(self) -> list[str]:
        """The job's process id, current folder and arguments."""
        return (self.notes / "job").read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine without any Python yet; what was started there and still runs is killed."""
    machine = Machine(tmp_path)
    yield machine
    for process in machine.started:
        if process.returncode is None:
            machine.kill(process)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so; ten seconds at most."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_one_sentence(errors: str, *words: str) -> bool:
    """Is this a single line from us, a whole sentence, with these words in it?"""
    return (
        errors.startswith("shardmill: ")
        and errors.count("\n") == 1
        and errors.endswith(".\n")
        and all(word in errors for word in words)
    )


class TestFindingPython:
    def test_no_python(self, machine: Machine) -> None:
        """Without any Python: one sentence, 69, and nothing is made."""
        code, errors = machine.run()
        assert code == 69
        assert is_one_sentence(errors, "no Python 3.11 to 3.14", "no python3 at all")
        assert not (machine.project / ".venv").exists()

    @pytest.mark.parametrize("version", ["3 10 13", "3 15 0"])
    def test_unfit_python(self, machine: Machine, version: str) -> None:
        """A Python too old, or too new for the pins: one sentence that names what was found."""
        machine.add_python(version=version)
        code, errors = machine.run()
        assert code == 69
        assert is_one_sentence(errors, f"python3 is {version.replace(' ', '.')}")

    def test_python_2(self, machine: Machine) -> None:
        """A `python` that is Python 2, and fails on our options, counts as none."""
        (machine.bin / "python").write_text("#!/usr/bin/env bash\nexit 2\n")
        (machine.bin / "python").chmod(0o755)
        code, errors = machine.run()
        assert code == 69
        assert is_one_sentence(errors, "no python3 at all")

    def test_newer_python_beside_an_old_one(self, machine: Machine) -> None:
        """python3 is too old, but python3.12 is there too: that one is taken."""
        machine.add_python("python3", version="3 9 2")
        machine.add_python("python3.12")
        assert machine.run()[0] == 0
        assert (machine.project / ".venv/bin/python").resolve().name == "python3.12"

    def test_no_venv_module(self, machine: Machine) -> None:
        """Debian's python3 without python3-venv: one sentence that says what to install."""
        machine.add_python(has_venv="0")
        code, errors = machine.run()
        assert code == 69
        assert is_one_sentence(errors, "venv and ensurepip", "apt-get install python3-venv")


class TestMakingVenv:
    def test_only_once(self, machine: Machine) -> None:
        """The first start installs the pins and the project; the second installs nothing."""
        machine.add_python()
        code, errors = machine.run()
        assert code == 0
        assert is_one_sentence(errors.replace("...\n", ".\n"), "first run only")
        requirements, project = machine.pip_calls()
        assert requirements.endswith(f"--requirement {machine.project}/requirements.txt")
        assert project.endswith(f"--no-build-isolation --editable {machine.project}")
        assert machine.run() == (0, "")
        assert len(machine.pip_calls()) == 2

    @pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
    def test_again_when_requirements_change(self, machine: Machine, name: str) -> None:
        """What decides the packages has changed: they are installed again, and then not again."""
        machine.add_python()
        machine.run()
        with (machine.project / name).open("a") as file:
            file.write("# changed\n")
        code, errors = machine.run()
        assert code == 0
        assert "renewing" in errors
        assert machine.run() == (0, "")
        assert len(machine.pip_calls()) == 4

    def test_again_when_the_folder_moved(self, machine: Machine) -> None:
        """A copied project must not run the code of the folder it was copied from."""
        machine.add_python()
        machine.run()
        machine.project = machine.project.rename(machine.folder / "moved")
        code, errors = machine.run()
        assert code == 0
        assert "making" in errors
        assert machine.pip_calls()[-1].endswith(f"--editable {machine.project}")

    def test_pip_fails(self, machine: Machine) -> None:
        """A failing pip: its words, one sentence, 69, no stamp; the next start makes all anew."""
        machine.add_python(pip="echo ERROR: No matching distribution found for ray; exit 1")
        code, errors = machine.run()
        making, reason, sentence = errors.splitlines()
        assert code == 69
        assert "making" in making
        assert reason == "  | ERROR: No matching distribution found for ray"
        assert "pip could not install the requirements" in sentence
        assert machine.stamps() == []

        leftover = machine.project / ".venv/half-made"
        leftover.touch()
        machine.add_python()
        assert machine.run()[0] == 0
        assert machine.stamps() == ["run"]
        assert not leftover.exists()

    def test_renewal_interrupted(self, machine: Machine) -> None:
        """A renewal that ended half-way leaves nothing to build on: .venv is made anew."""
        machine.add_python()
        machine.run()
        (machine.project / "requirements.txt").write_text("click==8.5.1\n")
        machine.add_python(pip="exit 1")
        assert machine.run()[0] == 69
        machine.add_python()
        code, errors = machine.run()
        assert code == 0
        assert "making" in errors

    @pytest.mark.parametrize(
        ("words", "code", "reason"),
        [
            ("connection broken by 'NewConnectionError", 69, "no package index could be reached"),
            ("OSError: [Errno 28] No space left on device", 73, "the disk is full"),
        ],
    )
    def test_why_pip_failed(self, machine: Machine, words: str, code: int, reason: str) -> None:
        """No network and a full disk are told apart from other failures of pip."""
        machine.add_python(pip=f'echo "{words}"; exit 1')
        found, errors = machine.run()
        assert found == code
        assert reason in errors.splitlines()[-1]

    def test_killed_while_installing(self, machine: Machine) -> None:
        """SIGKILL in the middle leaves no stamp and no lock: the next start makes it anew."""
        machine.add_python(pip="sleep 30")
        process = machine.start()
        wait_for(lambda: bool(machine.pip_calls()))
        machine.kill(process)
        assert machine.stamps() == []

        machine.add_python()
        code, errors = machine.run()
        assert code == 0
        assert "making" in errors
        assert machine.stamps() == ["run"]

    def test_two_starts_at_once(self, machine: Machine) -> None:
        """Two starts at once: one installs, the other waits, says so, and uses the result."""
        machine.add_python(pip="sleep 0.5")
        starts = [machine.start(), machine.start()]
        errors = sorted(process.communicate(timeout=30)[1] for process in starts)
        assert [process.returncode for process in starts] == [0, 0]
        assert "making" in errors[0]
        assert is_one_sentence(errors[1].replace("...\n", ".\n"), "waiting for another start")
        assert len(machine.pip_calls()) == 2

    def test_the_job_does_not_hold_the_lock(self, machine: Machine) -> None:
        """While the first start's job still runs, another start may renew .venv."""
        machine.add_python(job="sleep 30")
        machine.start()
        wait_for((machine.notes / "job").exists)
        (machine.project / "requirements.txt").write_text("click==8.5.1\n")
        machine.add_python()
        assert machine.run()[0] == 0

    def test_folder_not_writable(self, machine: Machine) -> None:
        """.venv cannot be made (a file is in its place): one sentence, 73."""
        machine.add_python()
        (machine.project / ".venv").touch()
        code, errors = machine.run()
        assert code == 73
        assert is_one_sentence(errors, "cannot be written")

    def test_somebody_elses_venv(self, machine: Machine) -> None:
        """A .venv that the user made is neither used nor deleted, and the sentence says why."""
        machine.add_python()
        kept = machine.project / ".venv/pyvenv.cfg"
        kept.parent.mkdir()
        kept.touch()
        code, errors = machine.run()
        assert code == 69
        assert is_one_sentence(errors, "not made by this script", "SHARDMILL_PYTHON=")
        assert kept.exists()


class TestStartingTheJob:
    def test_arguments_and_folder(self, machine: Machine) -> None:
        """Arguments arrive as given, and paths stay relative to the caller's folder."""
        machine.add_python()
        elsewhere = machine.folder / "else where"
        elsewhere.mkdir()
        machine.run("run_job.sh", "my job.yaml", "--set", "a=b c", "", "*", cwd=elsewhere)
        _, folder, *arguments = machine.job()
        assert folder == str(elsewhere)
        assert arguments == ["-P", "-m", "jobs", "run", "my job.yaml", "--set", "a=b c", "", "*"]

    def test_through_a_symlink(self, machine: Machine) -> None:
        """A symlink elsewhere, itself reached through a symlink, finds the project."""
        machine.add_python()
        (machine.folder / "first").symlink_to("the project/run_job.sh")
        (machine.folder / "second").symlink_to("first")
        assert machine.run(machine.folder / "second", "job.yaml")[0] == 0
        assert machine.stamps() == ["run"]

    def test_exit_code(self, machine: Machine) -> None:
        """The job's exit code is the script's."""
        machine.add_python(job="exit 75")
        assert machine.run()[0] == 75

    def test_signals(self, machine: Machine) -> None:
        """The job is the process that was started: a signal to the script reaches it."""
        ready = machine.notes / "ready"
        machine.add_python(
            job=f"trap 'exit 75' TERM; touch '{ready}'; while :; do sleep 0.05; done"
        )
        process = machine.start()
        wait_for(ready.exists)
        assert machine.job()[0] == str(process.pid)
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 75


class TestLog:
    def test_all_output_is_appended(self, machine: Machine) -> None:
        """With SHARDMILL_LOG everything goes there, exit code as ever, and nothing elsewhere."""
        machine.add_python(job="echo out; echo err >&2; exit 65")
        log = machine.folder / "lo gs" / "%.log"
        assert machine.run(SHARDMILL_LOG=log) == (65, "")
        assert machine.run(SHARDMILL_LOG=log) == (65, "")
        lines = log.read_text().splitlines()
        assert [line for line in lines if line in ("out", "err")] == ["out", "err"] * 2
        assert sum("started by run_job.sh" in line for line in lines) == 2
        assert sum("first run only" in line for line in lines) == 1

    def test_is_relative_to_the_callers_folder(self, machine: Machine) -> None:
        """As paths among the arguments are."""
        machine.add_python()
        elsewhere = machine.folder / "else where"
        elsewhere.mkdir()
        machine.run(cwd=elsewhere, SHARDMILL_LOG="-log")
        assert "started by" in (elsewhere / "-log").read_text()

    def test_rotates(self, machine: Machine) -> None:
        """A log of 10 MiB makes room; three old ones are kept, and none grows without end."""
        machine.add_python()
        log = machine.folder / "job.log"
        for number in range(6):
            log.write_text(f"{number}\n" + "x" * 10 * 2**20)
            assert machine.run(SHARDMILL_LOG=log) == (0, "")
        assert log.stat().st_size < 1000
        kept = sorted(machine.folder.glob("job.log.*"))
        assert [path.suffix for path in kept] == [".1", ".2", ".3"]
        assert [path.read_text()[0] for path in kept] == ["5", "4", "3"]

    def test_cannot_be_written(self, machine: Machine) -> None:
        """A folder, or a place where none can be made: one sentence, 73, and no job."""
        machine.add_python()
        for log in (machine.folder, machine.bin / "python3" / "log"):
            code, errors = machine.run(SHARDMILL_LOG=log)
            assert code == 73
            assert is_one_sentence(errors, "SHARDMILL_LOG=", "cannot be written")
        assert not (machine.notes / "job").exists()

    def test_signals_reach_the_job(self, machine: Machine) -> None:
        """The log takes no process of its own: the job is the one that was started."""
        ready = machine.notes / "ready"
        machine.add_python(
            job=f"trap 'exit 75' TERM; touch '{ready}'; while :; do sleep 0.05; done"
        )
        process = machine.start(SHARDMILL_LOG=str(machine.folder / "log"))
        wait_for(ready.exists)
        assert machine.job()[0] == str(process.pid)
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 75


class TestGivenPython:
    def test_is_used(self, machine: Machine) -> None:
        """With SHARDMILL_PYTHON the job runs there, exit code and all, and no .venv is made."""
        given = machine.add_python("given", job='echo "$PYTHONPATH" >&2; exit 75')
        code, errors = machine.run(SHARDMILL_PYTHON=given, PYTHONPATH="/somewhere")
        assert code == 75
        assert errors == f"{machine.project}:/somewhere\n"
        assert not (machine.project / ".venv").exists()

    def test_lacks_requirements(self, machine: Machine) -> None:
        """SHARDMILL_PYTHON without the requirements: one sentence that names them."""
        given = machine.add_python("given", missing="ray[default]>=2.56, torch>=2.6")
        code, errors = machine.run(SHARDMILL_PYTHON=given)
        assert code == 69
        assert is_one_sentence(errors, "lacks ray[default]>=2.56, torch>=2.6")

    @pytest.mark.parametrize("given", ["/no/such/python", "bash"])
    def test_is_no_python(self, machine: Machine, given: str) -> None:
        """SHARDMILL_PYTHON that is not there, or no Python: one sentence."""
        code, errors = machine.run(SHARDMILL_PYTHON=given)
        assert code == 69
        assert is_one_sentence(errors, f"SHARDMILL_PYTHON={given}")

    def test_absent_requirements(self, tmp_path: Path) -> None:
        """Absent packages are listed, the extra's too; what is installed is not."""
        listed = list_missing(tmp_path, ["pytest>=8", "no-such-package[x]>=1"], ["nor-this-one"])
        assert listed == "no-such-package[x]>=1, nor-this-one"

    def test_versions_out_of_range(self, tmp_path: Path) -> None:
        """With nothing absent, versions out of range are listed, with what was found."""
        listed = list_missing(tmp_path, ["pytest>=8", "pytest>=9999"], ["packaging<1"])
        assert listed == (
            f"pytest>=9999 (it has {version('pytest')}), "
            f"packaging<1 (it has {version('packaging')})"
        )

    def test_nothing_missing(self, tmp_path: Path) -> None:
        """Nothing is listed where all is there."""
        assert list_missing(tmp_path, ["pytest>=8"], ["packaging"]) == ""


def list_missing(folder: Path, dependencies: list[str], test: list[str]) -> str:
    """What missing_requirements.py says of this Python, for a project with these requirements."""
    pyproject = folder / "pyproject.toml"
    pyproject.write_text(
        f"[project]\ndependencies = {dependencies}\noptional-dependencies.test = {test}\n"
    )
    script = ROOT / "scripts/missing_requirements.py"
    return subprocess.run(
        [sys.executable, script, pyproject, "test"], capture_output=True, text=True, check=True
    ).stdout.strip()


class TestRunTests:
    def test_checks_in_order(self, machine: Machine) -> None:
        """Lint, format, types, then pytest with the caller's arguments; both stages installed."""
        machine.add_python()
        assert machine.run("run_tests.sh", "-k", "some name")[0] == 0
        assert machine.stamps() == ["run", "test"]
        assert (machine.notes / "checks").read_text().splitlines() == [
            "-m ruff check .",
            "-m ruff format --check .",
            "-m mypy",
            "-m pytest -q -rs -k some name",
        ]

    def test_faults_are_chosen(self, machine: Machine) -> None:
        """With --faults the long set of fault tests runs, and nothing else of pytest's."""
        machine.add_python()
        assert machine.run("run_tests.sh", "--faults", "-x")[0] == 0
        checks = (machine.notes / "checks").read_text().splitlines()
        assert checks[-1] == "-m pytest -q -rs -m faults -x"

    def test_stops_at_the_first_failure(self, machine: Machine) -> None:
        """A check that fails ends the run with its exit code; the later ones do not start."""
        machine.add_python(check="exit 3")
        assert machine.run("run_tests.sh")[0] == 3
        assert (machine.notes / "checks").read_text().splitlines() == ["-m ruff check ."]

    def test_adds_to_the_jobs_venv(self, machine: Machine) -> None:
        """After run_job.sh, run_tests.sh installs its tools only; .venv still serves the job."""
        machine.add_python()
        machine.run()
        machine.run("run_tests.sh")
        assert len(machine.pip_calls()) == 3
        assert machine.pip_calls()[-1].endswith("/requirements-test.txt")
        assert machine.run() == (0, "")


class TestPins:
    def test_everything_is_pinned(self) -> None:
        """Every line of the pinned files is one exact release: no ranges, options or addresses."""
        for path in ROOT.glob("requirements*.txt"):
            for line in path.read_text().splitlines():
                assert re.match(r"#|[a-z0-9-]+==[0-9][0-9a-z.]*( ; |$)", line), line
                assert "://" not in line

    def test_pins_fit_the_ranges(self) -> None:
        """Each dependency in pyproject.toml is pinned, within the range given there."""
        pins = {
            name: version
            for path in ROOT.glob("requirements*.txt")
            for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", path.read_text(), re.M)
        }
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        for text in project["dependencies"] + project["optional-dependencies"]["test"]:
            requirement = Requirement(text)
            assert requirement.specifier.contains(pins[requirement.name.lower()]), text
