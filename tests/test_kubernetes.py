"""The manifests: what Kubernetes and KubeRay know, and nothing taken apart on its way."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import example, given, settings

from jobs.config import JobConfig
from jobs.schedulers import kubernetes
from jobs.schedulers.submission import Submission
from pipeline.errors import JobFileError
from tests.fake_slurm import make_program
from tests.kubernetes_fields import SCHEMAS
from tests.submissions import make_job, make_submission, texts

KUBERAY = {"image": "registry/shardmill:1", "volume_claim": "shared", "secret": "tokens"}


def expanded(text: str) -> str:
    """A variable's value or a command's word as Kubernetes hands it to a container.

    `$$` stands for `$`, and `$(NAME)` for a variable, of which there is one here.
    """
    known = {"$$": "$", "$(KNOWN)": "known"}
    return re.sub(r"\$\$|\$\([^)]*\)", lambda found: known.get(found[0], found[0]), text)


class TestKubernetes:
    @pytest.mark.parametrize(
        "cluster",
        [
            {},
            {"nodes": 4, "gpus_per_node": 8, "cpus_per_node": 32, "memory": "200G"},
            {"walltime": "8h", "env": {"HF_HOME": "/data/hf"}, "gpus_per_node": 0},
            {"schedule": "0 2 * * *", "walltime": "90s"},
        ],
    )
    def test_fields(self, cluster: dict[str, Any]) -> None:
        """Every field is one that the servers know, in its place and of its type."""
        manifests = list(
            yaml.safe_load_all(kubernetes.render(make_submission(kuberay=KUBERAY, **cluster)))
        )
        for manifest in manifests:
            jsonschema.validate(manifest, SCHEMAS[manifest["kind"]])
        kind = "CronJob" if "schedule" in cluster else "RayJob"
        assert [manifest["kind"] for manifest in manifests] == ["ConfigMap", kind]

    def test_nodes_and_resources(self) -> None:
        """The head works too; GPUs, cores and memory are asked for as each node has them."""
        submission = make_submission(nodes=4, gpus_per_node=8, memory="64G", kuberay=KUBERAY)
        spec = list(yaml.safe_load_all(kubernetes.render(submission)))[1]["spec"]["rayClusterSpec"]
        [others] = spec["workerGroupSpecs"]
        assert others["replicas"] == others["minReplicas"] == others["maxReplicas"] == 3
        for group in (spec["headGroupSpec"], others):
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert limits == {"nvidia.com/gpu": 8, "memory": "64Gi"}

    def test_a_cron_job_knows_the_exit_codes(self) -> None:
        """One run at a time; what a person must mend is not tried again, a lost node is."""
        submission = make_submission(schedule="0 2 * * *", kuberay=KUBERAY)
        spec = list(yaml.safe_load_all(kubernetes.render(submission)))[1]["spec"]
        assert spec["concurrencyPolicy"] == "Forbid"
        job = spec["jobTemplate"]["spec"]
        ignored, failed = job["podFailurePolicy"]["rules"]
        assert ignored["onPodConditions"][0]["type"] == "DisruptionTarget"
        assert failed["onExitCodes"]["values"] == [2, 65, 70, 73, 78]
        assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy demands it

    @settings(max_examples=50)
    @given(value=texts, template=texts)
    @example(value="\x85", template="\u2028\n")
    @example(value="$(KNOWN) $$ $$(KNOWN) $(x $x $$$", template="$(KNOWN)")
    def test_texts_arrive_whole(self, value: str, template: str) -> None:
        """Whatever is in a variable or a prompt: the pod gets the same job."""
        job = make_job(kuberay=KUBERAY, env={"VALUE": value})
        prompt = job.prompt.model_copy(update={"template": template})
        job = job.model_copy(update={"prompt": prompt})
        config_map, ray_job = yaml.safe_load_all(
            kubernetes.render(Submission(job, Path("/job.yaml"), ()))
        )
        head = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]
        environment = head["template"]["spec"]["containers"][0]["env"]
        [there] = [entry["value"] for entry in environment if entry["name"] == "VALUE"]
        assert expanded(there) == value
        read = JobConfig.model_validate(yaml.safe_load(config_map["data"]["job.yaml"]))
        assert read == job.model_copy(update={"cluster": read.cluster})

    def test_a_cron_jobs_command_arrives_whole(self) -> None:
        """Kubernetes looks for variables in it as well."""
        python = "/opt/$(KNOWN)/$$/python"
        submission = make_submission(schedule="0 2 * * *", python=python, kuberay=KUBERAY)
        spec = list(yaml.safe_load_all(kubernetes.render(submission)))[1]["spec"]
        [container] = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        assert expanded(container["command"][0]) == python

    def test_a_cron_jobs_time_zone(self) -> None:
        """Where the job file names one the schedule is in it, else in the controller's."""
        for zone in (None, "Europe/Berlin"):
            kuberay = {**KUBERAY, "time_zone": zone}
            submission = make_submission(schedule="0 2 * * *", kuberay=kuberay)
            cron_job = list(yaml.safe_load_all(kubernetes.render(submission)))[1]
            jsonschema.validate(cron_job, SCHEMAS["CronJob"])
            assert cron_job["spec"].get("timeZone") == zone

    def test_what_is_missing(self) -> None:
        """No image, or a CronJob over several nodes: a sentence with the setting's name."""
        with pytest.raises(JobFileError, match=r"'cluster\.kuberay' is missing"):
            kubernetes.render(make_submission())
        with pytest.raises(JobFileError, match=r"cluster\.nodes is 2"):
            kubernetes.render(make_submission(nodes=2, schedule="0 2 * * *", kuberay=KUBERAY))

    @pytest.mark.parametrize(
        ("block", "values", "words"),
        [
            ("input", {"path": ["/data/a", "/home/b"]}, r"input\.path '/home/b': "),
            ("input", {"dataset": "/saved"}, r"input\.dataset '/saved': "),
            ("model", {"path": "/database/m"}, r"model\.path '/database/m': "),
            ("model", {"path": "org/m", "adapter": "/l"}, r"model\.adapter '/l': "),
            ("output", {"path": "/out"}, r"output\.path '/out': "),
        ],
    )
    def test_paths_must_lie_on_the_claim(
        self, block: str, values: dict[str, Any], words: str
    ) -> None:
        """The pods have no others; without a claim they may have what they like."""
        for claim in (KUBERAY, {"image": "i"}):
            job = make_job(kuberay=claim).model_dump(mode="json")
            changed = JobConfig.model_validate(job | {block: values})
            submission = Submission(changed, Path("/job.yaml"), ())
            if claim is KUBERAY:
                with pytest.raises(JobFileError, match=words + "the pods have the claim 'shared'"):
                    kubernetes.render(submission)
            else:
                assert kubernetes.render(submission)

    def test_hub_ids_and_urls_are_no_paths(self) -> None:
        """They are the same everywhere."""
        job = make_job(kuberay=KUBERAY).model_dump(mode="json")
        job |= {"input": {"dataset": "org/d"}, "model": {"path": "org/m", "adapter": "org/l"}}
        assert kubernetes.render(Submission(JobConfig.model_validate(job), Path("/job.yaml"), ()))

    @pytest.mark.parametrize(
        ("state", "verbs"),
        [
            ("", ["get", "apply"]),
            ("Running", ["get", "apply"]),
            ("Complete", ["get", "delete", "apply"]),
            ("Failed", ["get", "delete", "apply"]),
        ],
    )
    def test_only_what_has_ended_is_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, verbs: list[str]
    ) -> None:
        """A RayJob at work is left alone when it is sent once more."""
        text = f"""#!/bin/sh
echo "$3" >>"{tmp_path}/verbs"
case "$3" in
  get) printf %s "{state}" ;;
  apply) cat >"{tmp_path}/applied" ;;
esac
"""
        make_program(tmp_path / "kubectl", text)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        submission = make_submission(kuberay=KUBERAY)
        kubernetes.send(submission)
        assert (tmp_path / "verbs").read_text().split() == verbs
        assert (tmp_path / "applied").read_text() == kubernetes.render(submission)
