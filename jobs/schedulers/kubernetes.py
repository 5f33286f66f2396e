"""A job as manifests for Kubernetes: a RayJob for KubeRay, or a CronJob.

Both bring the job file along, in a ConfigMap.
"""

from __future__ import annotations

import math
import shlex
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

from jobs.cluster_settings import KuberaySettings
from jobs.durations import parse_duration
from jobs.schedulers.programs import call
from jobs.schedulers.submission import Submission
from jobs.yaml_text import dump_yaml, dump_yaml_documents
from pipeline.errors import JobFileError

JOB_FOLDER = "/etc/shardmill"
BACKOFF_LIMIT = 5
"""Starts after the first one; each continues."""

FOR_A_PERSON = (2, 65, 70, 73, 78)
"""Exit codes after which the same command would fail again; see docs/exit-codes.md."""

GRACE_SECONDS = 120
"""Until a pod that is to end is killed: more than a run's grace time."""

Manifest = dict[str, Any]


def render(submission: Submission) -> str:
    """The manifests, as one YAML text.

    Raises:
        JobFileError: the job file does not say what Kubernetes needs to know.
    """
    _check_paths(submission)
    job = _ray_job if submission.cluster.schedule is None else _cron_job
    return dump_yaml_documents(_config_map(submission), job(submission))


def send(submission: Submission) -> str:
    """Applies the manifests. One that is there already and is at work stays as it is.

    Raises:
        JobFileError: see `render`.
        ResourceError: kubectl is missing, or the cluster does not take them.
    """
    text = render(submission)
    where = ["kubectl", "--namespace", _kuberay(submission).namespace]
    if submission.cluster.schedule is None:
        # KubeRay keeps a RayJob that has ended, and applying it again would do nothing.
        this, state = ["rayjob", submission.name], "jsonpath={.status.jobDeploymentStatus}"
        if call([*where, "get", *this, "--ignore-not-found", "--output", state]).strip() in (
            "Complete",
            "Failed",
        ):
            call([*where, "delete", *this])
    return call([*where, "apply", "--filename", "-"], text).strip()


def _check_paths(submission: Submission) -> None:
    """Refuses local paths that the pods would not find on the claim."""
    kuberay, outside = _kuberay(submission), []
    if kuberay.volume_claim is None:
        return
    for setting, path in submission.local_paths:
        if not PurePosixPath(path).is_relative_to(kuberay.mount_path):
            outside.append(f"{setting} '{path}'")
    if outside:
        raise JobFileError(
            f"{submission.job_file}: {', '.join(outside)}: the pods have the claim "
            f"'{kuberay.volume_claim}' at {kuberay.mount_path} (cluster.kuberay.mount_path), and "
            "each local path of the job must lie below it, as the pods see it"
        )


def _ray_job(submission: Submission) -> Manifest:
    cluster = submission.cluster
    others = {
        "groupName": "others",
        "replicas": cluster.nodes - 1,
        "minReplicas": cluster.nodes - 1,
        "maxReplicas": cluster.nodes - 1,
        "rayStartParams": {},
        "template": {"spec": _pod(submission, "ray-worker")},
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(submission),
        "spec": {
            "entrypoint": shlex.join(_command(submission)),
            "submissionMode": "K8sJobMode",
            "backoffLimit": BACKOFF_LIMIT,
            **_deadline(submission),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 300,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {},
                    "template": {"spec": _pod(submission, "ray-head")},
                },
                "workerGroupSpecs": [others] if cluster.nodes > 1 else [],
            },
        },
    }


def _cron_job(submission: Submission) -> Manifest:
    if submission.cluster.nodes > 1:
        raise JobFileError(
            f"cluster.schedule makes a CronJob of one pod, and cluster.nodes is "
            f"{submission.cluster.nodes}: set it to 1, or leave the schedule out and have "
            "`shardmill submit` started when it is time"
        )
    pod, zone = _pod(submission, "shardmill"), _kuberay(submission).time_zone
    pod["containers"][0]["command"] = [_literal(word) for word in _command(submission)]
    rules = [
        {
            "action": "Ignore",  # the node is drained, or needed for something else
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": "shardmill",
                "operator": "In",
                "values": list(FOR_A_PERSON),
            },
        },
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": _metadata(submission),
        "spec": {
            "schedule": submission.cluster.schedule,
            **({} if zone is None else {"timeZone": zone}),
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3600,
            "jobTemplate": {
                "spec": {
                    "backoffLimit": BACKOFF_LIMIT,
                    **_deadline(submission),
                    "podFailurePolicy": {"rules": rules},
                    "template": {"spec": {"restartPolicy": "Never", **pod}},
                }
            },
        },
    }


def _config_map(submission: Submission) -> Manifest:
    """The job file, resolved: what was relative to it here has a whole path there."""
    job = submission.job.model_dump(mode="json", exclude_unset=True, exclude={"cluster"})
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(submission),
        "data": {"job.yaml": dump_yaml(job)},
    }


def _metadata(submission: Submission) -> Manifest:
    return {
        "name": submission.name,
        "namespace": _kuberay(submission).namespace,
        "labels": {"app.kubernetes.io/name": "shardmill"},
    }


def _deadline(submission: Submission) -> Manifest:
    walltime = submission.cluster.walltime
    return {"activeDeadlineSeconds": math.ceil(parse_duration(walltime))} if walltime else {}


def _command(submission: Submission) -> list[str]:
    python = submission.cluster.python or "python"
    return [python, "-P", "-m", "jobs", "run", f"{JOB_FOLDER}/job.yaml"]


def _pod(submission: Submission, container: str) -> Manifest:
    kuberay = _kuberay(submission)
    volumes: list[Manifest] = [{"name": "job", "configMap": {"name": submission.name}}]
    mounts: list[Manifest] = [{"name": "job", "mountPath": JOB_FOLDER, "readOnly": True}]
    if kuberay.volume_claim is not None:
        claim = {"claimName": kuberay.volume_claim}
        volumes.append({"name": "data", "persistentVolumeClaim": claim})
        mounts.append({"name": "data", "mountPath": kuberay.mount_path})
    variables = {"RAY_USAGE_STATS_ENABLED": "0", **submission.cluster.env}
    secrets = [{"secretRef": {"name": kuberay.secret}}] if kuberay.secret else []
    return {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [
            {
                "name": container,
                "image": kuberay.image,
                "env": [
                    {"name": name, "value": _literal(value)} for name, value in variables.items()
                ],
                "envFrom": secrets,
                "resources": {"requests": _resources(submission), "limits": _resources(submission)},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _literal(text: str) -> str:
    """A text in which Kubernetes finds no `$(NAME)` to replace."""
    return text.replace("$", "$$")


def _resources(submission: Submission) -> Manifest:
    cluster = submission.cluster
    return {
        **({"nvidia.com/gpu": cluster.gpus_per_node} if cluster.gpus_per_node else {}),
        **({"cpu": cluster.cpus_per_node} if cluster.cpus_per_node else {}),
        **({"memory": f"{cluster.memory}i"} if cluster.memory else {}),
    }


def _kuberay(submission: Submission) -> KuberaySettings:
    kuberay = submission.cluster.kuberay
    if kuberay is None:
        raise JobFileError(
            f"{submission.job_file}: 'cluster.kuberay' is missing: --to kuberay needs to know at "
            "least its image"
        )
    return kuberay
