"""The fields of Kubernetes and KubeRay that our manifests may have, as JSON Schema.

Names and types as in the API references of Kubernetes 1.33 (batch/v1, core/v1) and KubeRay 1.6
(ray.io/v1); an excerpt. A field that is not listed would be dropped or refused by the server.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def an_object(required: str = "", **properties: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def a_list(items: Schema, **more: int) -> Schema:
    """A list of these."""
    return {"type": "array", "items": items, **more}


def one_of(*values: str) -> Schema:
    """One of these words."""
    return {"enum": list(values)}


TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SECONDS: Schema = {"type": "integer", "minimum": 1}
MAP: Schema = {"type": "object", "additionalProperties": TEXT}
# DNS-1035, as KubeRay asks of a RayJob's name, and no longer than it allows.
NAME: Schema = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
QUANTITY: Schema = {"type": ["string", "integer"], "pattern": r"^[0-9]+(Mi|Gi|Ti)?$"}
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}

METADATA = an_object("name namespace", name=NAME, namespace=TEXT, labels=MAP)
CONTAINER = an_object(
    "name image",
    name=NAME,
    image=TEXT,
    command=a_list(TEXT),
    env=a_list(
        an_object("name", name={"type": "string", "pattern": "^[A-Za-z_]\\w*$"}, value=TEXT)
    ),
    envFrom=a_list(an_object("secretRef", secretRef=an_object("name", name=TEXT))),
    resources=an_object(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=a_list(
        an_object("name mountPath", name=NAME, mountPath=TEXT, readOnly=FLAG),
    ),
)
VOLUME = an_object(
    "name",
    name=NAME,
    configMap=an_object("name", name=TEXT),
    persistentVolumeClaim=an_object("claimName", claimName=TEXT),
)
POD = an_object(
    "containers",
    restartPolicy=one_of("Never", "OnFailure", "Always"),
    terminationGracePeriodSeconds=COUNT,
    containers=a_list(CONTAINER, minItems=1),
    volumes=a_list(VOLUME),
)
POD_TEMPLATE = an_object("spec", spec=POD)

CONFIG_MAP = an_object(
    "apiVersion kind metadata",
    apiVersion={"const": "v1"},
    kind={"const": "ConfigMap"},
    metadata=METADATA,
    data=MAP,
)
RAY_CLUSTER = an_object(
    "headGroupSpec rayVersion",
    rayVersion={"type": "string", "pattern": r"^2\.(5[2-9]|[6-9]\d)\.\d+$"},
    authOptions=an_object(mode=one_of("token", "disabled")),
    headGroupSpec=an_object("rayStartParams template", rayStartParams=MAP, template=POD_TEMPLATE),
    workerGroupSpecs=a_list(
        an_object(
            "groupName rayStartParams template",
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=MAP,
            template=POD_TEMPLATE,
        )
    ),
)
RAY_JOB = an_object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=METADATA,
    spec=an_object(
        "rayClusterSpec",
        entrypoint=TEXT,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
        backoffLimit=COUNT,
        activeDeadlineSeconds=SECONDS,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=RAY_CLUSTER,
    ),
)
RULE = an_object(
    "action",
    action=one_of("FailJob", "Ignore", "Count"),
    onExitCodes=an_object(
        "operator values",
        containerName=TEXT,
        operator=one_of("In", "NotIn"),
        values=a_list({"type": "integer", "minimum": 1}, minItems=1, maxItems=255),
    ),
    onPodConditions=a_list(an_object("type status", type=TEXT, status=one_of("True", "False"))),
)
JOB = an_object(
    "template",
    backoffLimit=COUNT,
    activeDeadlineSeconds=SECONDS,
    podFailurePolicy=an_object("rules", rules=a_list(RULE, maxItems=20)),
    template=POD_TEMPLATE,
)
CRON_JOB = an_object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "batch/v1"},
    kind={"const": "CronJob"},
    metadata=METADATA,
    spec=an_object(
        "schedule jobTemplate",
        schedule=TEXT,
        timeZone=TEXT,
        concurrencyPolicy=one_of("Allow", "Forbid", "Replace"),
        startingDeadlineSeconds=COUNT,
        jobTemplate=an_object("spec", spec=JOB),
    ),
)

SCHEMAS = {"ConfigMap": CONFIG_MAP, "RayJob": RAY_JOB, "CronJob": CRON_JOB}
