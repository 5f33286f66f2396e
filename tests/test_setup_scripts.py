"""run_job.sh and run_tests.sh make their environment, with fake Pythons on PATH."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.fake_machine import (
    ROOT,
    Machine,
    is_one_sentence,
    wait_for,
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
            "-m pytest -q -rs -n 2 --dist worksteal -k some name",
        ]

    def test_faults_are_chosen(self, machine: Machine) -> None:
        """With --faults the long set of fault tests runs, and nothing else of pytest's."""
        machine.add_python()
        assert machine.run("run_tests.sh", "--faults", "-x")[0] == 0
        checks = (machine.notes / "checks").read_text().splitlines()
        assert checks[-1] == "-m pytest -q -rs -n 2 --dist worksteal -m faults -x"

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
