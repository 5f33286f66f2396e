"""run_job.sh: the job is started as it is, logged, and in the Python that was asked for."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.fake_machine import ROOT, Machine, is_one_sentence, wait_for


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
