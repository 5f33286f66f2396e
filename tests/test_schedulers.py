"""What `shardmill submit` prints and sends: nothing in a path or a value may be taken apart."""

from __future__ import annotations

import importlib.util
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings

from jobs.config import load_job
from jobs.schedulers import crontab, programs, ray_jobs
from jobs.schedulers.known import SCHEDULERS
from jobs.schedulers.submission import prepare_submission
from pipeline.errors import JobFileError, ResourceError
from tests.argument_recorder import as_path, make_recorder, recorded
from tests.fake_cron import as_cron
from tests.fake_slurm import make_program
from tests.kubernetes_fields import SCHEMAS
from tests.submissions import make_submission, texts

ROOT = Path(__file__).parents[1]

# All of a line must fit into the 998 bytes that cron reads.
short_texts = texts.map(lambda text: text[:25])
short_paths = short_texts.map(as_path)


class TestCron:
    @settings(max_examples=30)
    @given(path=short_paths, value=short_texts, script=texts)
    def test_words_arrive_whole(
        self, tmp_path_factory: pytest.TempPathFactory, path: str, value: str, script: str
    ) -> None:
        """Whatever is in a path or a variable, but for line breaks, passes cron and sh as it is."""
        folder = tmp_path_factory.mktemp("cron")
        path, value = (" ".join(f"{text}%".splitlines()) for text in (path, value))
        name = "".join(c for c in script if c in string.printable and c not in "/\n\r")[:50]
        recorder = make_recorder(folder / f"%{name}")
        submission = make_submission(path, env={"VALUE": value}, schedule="0 2 * * *")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(crontab, "SCRIPT", recorder)
            mark, line = crontab.render(submission).removesuffix("\n").split("\n")
        assert mark == f"# {submission.name}"
        assert line.startswith("0 2 * * * ")
        subprocess.run(["sh", "-c", as_cron(line)], check=True, env={"PATH": os.defpath})
        assert recorded(recorder) == ([str(Path(path))], value)

    def test_a_line_break_is_refused(self) -> None:
        """A crontab has no way to write one."""
        with pytest.raises(JobFileError, match="line break"):
            crontab.render(make_submission("/jobs/a\nb.yaml", schedule="0 2 * * *"))

    def test_a_long_line_is_refused(self) -> None:
        """Cron would cut it without a word, and run what is left."""
        override = f"prompt.template={'ä' * 500}"
        with pytest.raises(
            JobFileError, match=r"1\d\d\d bytes.*put the settings into the job file"
        ):
            crontab.render(make_submission("/job.yaml", override, schedule="0 2 * * *"))

    def test_a_time_is_needed(self) -> None:
        """With a way to give it."""
        with pytest.raises(JobFileError, match=r"--set cluster.schedule='0 2 \* \* \*'"):
            crontab.render(make_submission())

    def test_only_our_own_line_is_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Sent twice, or with another time: one line of the job, and all others as they were."""
        text = f"""#!/bin/sh
case "$1" in
  -l) cat "{tmp_path}/tab" 2>/dev/null || {{ echo "no crontab for me" >&2; exit 1; }} ;;
  -) cat >"{tmp_path}/tab" ;;
esac
"""
        make_program(tmp_path / "crontab", text)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        tab = tmp_path / "tab"
        crontab.send(make_submission(schedule="0 2 * * *"))
        assert tab.read_text() == crontab.render(make_submission(schedule="0 2 * * *"))
        others = "MAILTO=me\n" + tab.read_text() + "# mine\n5 * * * *  /bin/true %x\n# end"
        tab.write_text(others)
        crontab.send(make_submission(schedule="0 2 * * *"))
        crontab.send(make_submission(schedule="30 4 * * 1-5"))
        new = crontab.render(make_submission(schedule="30 4 * * 1-5"))
        assert tab.read_text() == "MAILTO=me\n# mine\n5 * * * *  /bin/true %x\n# end\n" + new
        # Whoever has removed the job's line but not its mark has another line behind it.
        mark = new.split("\n", 1)[0].encode()
        tab.write_bytes(mark + b"\n1 1 * * * backup --of M\xfcnchen\n")
        crontab.send(make_submission(schedule="30 4 * * 1-5"))
        assert tab.read_bytes() == b"1 1 * * * backup --of M\xfcnchen\n" + new.encode()


class TestRayJobs:
    def test_the_stop_is_given_time(self) -> None:
        """Ray would kill the run three seconds after `ray job stop`."""
        line = ray_jobs.render(make_submission(walltime="8h", env={"A": "b c"}))
        assert '"RAY_JOB_STOP_WAIT_TIME_S": "90"' in line
        assert '"A": "b c"' in line
        assert line.endswith(" -P -m jobs run /jobs/job.yaml --max-walltime 8h\n")

    def test_no_program_is_looked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ray need not be on the PATH, nor beside the interpreter; where it is not, we say so."""
        monkeypatch.setattr(sys, "executable", "/opt/python")
        line = ray_jobs.render(make_submission())
        assert line.startswith("/opt/python -P -m ray.scripts.scripts job submit ")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ResourceError, match="needs Ray in the environment of /opt/python"):
            ray_jobs.render(make_submission())


@pytest.fixture
def job_file(tmp_path: Path) -> Iterator[Path]:
    """The quickstart's, and a current folder."""
    path = tmp_path / "here" / "job.yaml"
    path.parent.mkdir()
    text = (ROOT / "configs" / "quickstart" / "job.yaml").read_text(encoding="utf-8")
    path.write_text(text + "cluster: {schedule: 0 2 * * *, kuberay: {image: i}}\n")
    before = Path.cwd()
    os.chdir(path.parent)
    yield path
    os.chdir(before)


class TestSubmission:
    def test_overrides_mean_the_same_elsewhere(self, job_file: Path) -> None:
        """A path on the command line is relative to where that was given, not to Slurm's folder."""
        overrides = ["input.path=in/ü\x7f.parquet", "model.quantization.method=nf4"]
        overrides += ["output.path=out", "generation.stop=['a b', c]", "model.adapter=./lora"]
        there = prepare_submission(Path("job.yaml"), overrides)
        assert there.job_file == job_file
        os.chdir("/")
        assert all(override.isascii() for override in there.overrides)
        assert load_job(there.job_file, there.overrides) == there.job
        assert there.job.input.path == str(job_file.parent / "in" / "ü\x7f.parquet")

    def test_the_cluster_block_stays_here(self, job_file: Path) -> None:
        """What a scheduler was asked for is not told to the run."""
        submission = prepare_submission(job_file, ["cluster.nodes=3", "cluster={nodes: 4}"])
        assert submission.cluster.nodes == 4
        assert submission.overrides == ()

    def test_names(self, job_file: Path) -> None:
        """The same for the same run folder, another for another, and fit for every scheduler."""
        name = prepare_submission(job_file, ["input.limit=5"]).name
        assert name == prepare_submission(job_file, []).name
        assert name != prepare_submission(job_file, ["output.path=/x"]).name
        long = prepare_submission(job_file, [f"name={'X_.' * 60}"]).name
        jsonschema.validate(long, SCHEMAS["RayJob"]["properties"]["metadata"]["properties"]["name"])

    def test_printing_sends_nothing(
        self, job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With --print no program is called at all."""
        monkeypatch.setattr(subprocess, "run", None)
        submission = prepare_submission(job_file, [])
        for scheduler in SCHEDULERS.values():
            assert submission.name in scheduler.render(submission)


class TestPrograms:
    def test_missing(self) -> None:
        """A sentence with the program's name and a way out."""
        with pytest.raises(ResourceError, match=r"'no-such-program'.*--print"):
            programs.call(["no-such-program"])

    def test_failing(self) -> None:
        """The last line that it has said."""
        command = ["sh", "-c", "echo first; echo 'invalid partition' >&2; exit 3"]
        with pytest.raises(ResourceError, match=r"^'sh' failed: invalid partition$"):
            programs.call(command)

    def test_silent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that never answers is given up."""
        monkeypatch.setattr(programs, "LIMIT", 0.2)
        with pytest.raises(ResourceError, match="has not answered"):
            programs.call(["sleep", "30"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("walltime=soon", "'cluster.walltime' must be a duration"),
        ("walltime=0s", "'cluster.walltime' must be a duration"),
        ("schedule=nightly", "'cluster.schedule' must be five fields"),
        ("schedule='0 2 * * *; rm'", "'cluster.schedule' must be five fields"),
        ("schedule='0 2 * * *;rm'", "'cluster.schedule' has '\\*;rm' as day of the week"),
        ("schedule='99 * * * *'", "'cluster.schedule' has '99' as minute: .* 0 to 59"),
        ("schedule='0 24 * * *'", "has '24' as hour: .* 0 to 23"),
        ("schedule='0 0 0 * *'", "has '0' as day of the month: .* 1 to 31"),
        ("schedule='0 0 1 13 *'", "has '13' as month: .* 1 to 12, jan to dec"),
        ("schedule='0 0 1 mon *'", "has 'mon' as month"),
        ("schedule='0 0 * * 7'", "has '7' as day of the week: .* 0 to 6, sun to sat"),
        ("schedule='0 5-3 * * *'", "has '5-3' as hour, which goes backwards"),
        ("schedule='*/0 * * * *'", "has '\\*/0' as minute, a step of 0"),
        ("schedule='5/15 * * * *'", "has '5/15' as minute; write 5-59/15"),
        ("schedule='0,, * * * *'", "has '' as minute"),
        ("schedule='0 2 */2 * 1'", "cron starts on days that are both, Kubernetes on .* either"),
        ("schedule='0 2 1 * */2'", "has '1' as day of the month and '\\*/2' as day of the week"),
        ("schedule='0 2 1,* * 1'", "Kubernetes starts on days that are both, cron on .* either"),
        ("schedule='0 2 1 * 5,*/01'", "make one of the two a \\*"),
        ("kuberay={image: i, time_zone: CET+1}", "has no zone 'CET\\+1'.*Europe/Berlin"),
        ("memory=64", "'cluster.memory' must"),
        ("env={'a b': c}", "'a b' is no environment variable"),
        ("slurm={time: 60}", "cannot take time: set cluster.walltime instead"),
        ("slurm={mem: 4G}", "cannot take mem: set cluster.memory instead"),
        ("slurm={signal: B:USR1}", "cannot take signal: the script settles it itself"),
        ("slurm={partition: 'a b'}", "cannot take partition"),
        ("slurm={Partition: a}", "'Partition' is no long name"),
        ("node=2", "did you mean 'cluster.nodes'"),
    ],
)
def test_wrong_settings(job_file: Path, setting: str, words: str) -> None:
    """Each gets a sentence, before anything is rendered."""
    with pytest.raises(JobFileError, match=words):
        prepare_submission(job_file, [f"cluster.{setting}"])


@pytest.mark.parametrize(
    "schedule",
    [
        "0 2 * * *",
        "*/15 8-18/2 1,15 jan-mar,DEC mon-Fri",
        "59 23 31 12 0,6",
        " 0  0 * * 6 ",
        "0 2 */2 * *",
        "0 2 *,1 * 1",
        "0 2 1 * 1",
        "0 2 */1 * 1",
        "0 2 1,* * *",
    ],
)
def test_schedules(job_file: Path, schedule: str) -> None:
    """What cron takes is taken; only spaces are put right."""
    submission = prepare_submission(job_file, [f"cluster.schedule='{schedule}'"])
    assert submission.cluster.schedule == " ".join(schedule.split())


def test_the_wheel_has_the_templates(tmp_path: Path) -> None:
    """Installed as a package, `submit` finds what it renders."""
    project = tmp_path / "project"
    for name in ("jobs", "pipeline"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, project / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    build = "import setuptools.build_meta as b; print(b.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=project, check=True, capture_output=True)
    [wheel] = project.glob("*.whl")
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True, check=True
    )
    assert "jobs/schedulers/slurm.sh.j2" in listing.stdout
    assert "jobs/schedulers/slurm.py" in listing.stdout


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_example_to_copy(name: str) -> None:
    """configs/cluster/job.yaml is taken by every scheduler as it stands; cron wants a time too."""
    schedule = ["cluster.schedule='0 2 * * *'"] if name == "cron" else []
    example = ROOT / "configs" / "cluster" / "job.yaml"
    submission = prepare_submission(example, schedule)
    assert submission.name in SCHEDULERS[name].render(submission)
