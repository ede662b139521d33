"""Builds the InferenceService as a mapping, from typed settings and a model. Pure: no connection, no clock."""

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.config import CONTAINER_NAME, PORT, InferenceServiceSettings
from resources.kubernetes.errors import SettingsError
from resources.kubernetes.naming import MANAGED_BY_LABEL, check_name

GROUP = "serving.kserve.io"
VERSION = "v1beta1"
KIND = "InferenceService"
PLURAL = "inferenceservices"

MODE_ANNOTATION = "serving.kserve.io/deploymentMode"
AUTOSCALER_ANNOTATION = "serving.kserve.io/autoscalerClass"
TAG_ROUTING_ANNOTATION = "serving.kserve.io/enable-tag-routing"
PREFIX = "cifar/"
"""Prefix of this package's annotations. KServe copies the service's annotations to its pods, so each pod names the
decision it results from."""
DIGEST_ANNOTATION = f"{PREFIX}model-digest"
VERSION_ANNOTATION = f"{PREFIX}model-version"
URI_ANNOTATION = f"{PREFIX}model-uri"
REVISION_ANNOTATION = f"{PREFIX}revision"
"""Digest of everything that affects what is served: equal digests need no new deployment."""
DEPLOYMENT_ANNOTATION = f"{PREFIX}deployment"
"""Random id of the deploy call that wrote the spec."""
_REQUEST = TypeAdapter(DeployRequest)


def predictor_name(name: str) -> str:
    """Name of the Service for the pods, and of the Deployment or Knative service."""
    return f"{name}-predictor"


def check_service_name(name: str, namespace: str) -> None:
    """SettingsError unless the name and the names that KServe and Knative derive from it are DNS-1035 labels."""
    predictor = predictor_name(name)
    check_name(KIND, name, f"isvc.{predictor}", f"{predictor}-{namespace}", f"{predictor}-00001-private")


def build_inference_service_manifest(
    settings: InferenceServiceSettings, request: DeployRequest, *, name: str, namespace: str
) -> dict[str, Any]:
    """The complete custom resource. SettingsError for a name from which no valid names can be derived."""
    check_service_name(name, namespace)
    scaling_annotations, scaling = _scaling(settings)
    predictor = _predictor(settings, request, scaling)
    annotations = {**settings.annotations, MODE_ANNOTATION: settings.mode, **scaling_annotations}
    labels = {**settings.labels, MANAGED_BY_LABEL: "dagster-inference-service"}
    identity = {"predictor": _without_traffic(predictor), "annotations": annotations, "labels": labels}
    annotations |= {
        REVISION_ANNOTATION: hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16],
        URI_ANNOTATION: request.model_uri,
        DIGEST_ANNOTATION: request.model_digest,
        VERSION_ANNOTATION: request.model_version,
        **{f"{PREFIX}{key}": value for key, value in request.annotations().items()},
    }
    metadata = {"name": name, "namespace": namespace, "labels": labels, "annotations": annotations}
    return _document(metadata, {"predictor": predictor})


def with_traffic(manifest: Mapping[str, Any], percent: int | None) -> dict[str, Any]:
    """The manifest with another percentage of the requests for its newest revision; None for all of them.

    Of a stored service, only the fields needed to create it are kept.
    """
    metadata = {key: manifest["metadata"].get(key) or {} for key in ("name", "namespace", "labels", "annotations")}
    share = {} if percent is None else {"canaryTrafficPercent": percent}
    predictor = {**_without_traffic(manifest["spec"]["predictor"]), **share}
    return copy.deepcopy(_document(metadata, {**manifest["spec"], "predictor": predictor}))


def percent_of(manifest: Mapping[str, Any]) -> int | None:
    """Percentage of the requests for a new model while it is judged; None if it is not."""
    return manifest["spec"]["predictor"].get("canaryTrafficPercent")


def request_of(annotations: Mapping[str, str]) -> DeployRequest | None:
    """The decision recorded on a service or a pod; None if it is not one of ours."""
    known = {key.removeprefix(PREFIX).replace("-", "_"): value for key, value in annotations.items()}
    try:
        return _REQUEST.validate_python(known)
    except ValidationError:
        return None


def _document(metadata: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": metadata, "spec": spec}


def _without_traffic(predictor: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in predictor.items() if key != "canaryTrafficPercent"}


def _scaling(settings: InferenceServiceSettings) -> tuple[dict[str, str], dict[str, Any]]:
    """Annotations of the service and fields of its predictor that differ between the modes."""
    share = {"canaryTrafficPercent": settings.canary_percent} if settings.canary_percent else {}
    if settings.serverless:
        # Tags name the newest revision and the previous one, so that a canary can be queried directly. Knative has its
        # own grace period: its queue proxy drains requests before the server is stopped.
        fields = {"scaleMetric": "concurrency", "scaleTarget": settings.target_concurrency, **share}
        return ({TAG_ROUTING_ANNOTATION: "true"} if share else {}), fields
    scaler = "hpa" if settings.max_replicas > settings.min_replicas else "none"
    return {AUTOSCALER_ANNOTATION: scaler}, {
        "scaleMetric": "cpu",
        "scaleTarget": settings.target_cpu_percent,
        # A replica terminates only after a ready one has replaced it.
        "deploymentStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "terminationGracePeriodSeconds": settings.termination_grace_seconds,
        **share,  # not stored: KServe would ignore it, and an HTTPRoute has it
    }


def _predictor(
    settings: InferenceServiceSettings, request: DeployRequest, scaling: Mapping[str, Any]
) -> dict[str, Any]:
    predictor = {
        "minReplicas": settings.min_replicas,
        "maxReplicas": settings.max_replicas,
        **scaling,
        "imagePullSecrets": [{"name": secret} for secret in settings.image_pull_secrets],
        "serviceAccountName": settings.service_account_name,
        "automountServiceAccountToken": False,
        "containers": [_container(settings, request)],
        "volumes": [
            {"name": "scratch", "emptyDir": {"sizeLimit": settings.scratch}},
            *({"name": volume, "configMap": {"name": name}} for volume, _, name in _mounts(settings)),
        ],
    }
    if both := sorted(set(predictor) & set(settings.extra_predictor)):
        raise SettingsError(f"extra_predictor sets {', '.join(both)}, which other settings control: use those.")
    return {**_without_empty(predictor), **copy.deepcopy(settings.extra_predictor)}


def _container(settings: InferenceServiceSettings, request: DeployRequest) -> dict[str, Any]:
    sources = [{"configMapRef": {"name": name}} for name in settings.env_config_maps]
    sources += [{"secretRef": {"name": name}} for name in settings.env_secrets]
    container = {
        "name": CONTAINER_NAME,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": [
            "--host=::",
            f"--port={PORT}",
            f"--model-uri={request.model_uri}",
            f"--model-digest={request.model_digest}",
            f"--model-version={request.model_version}",
            f"--threads={settings.threads}",
            f"--drain-delay={settings.drain_delay_seconds:g}",
            f"--linger={settings.linger_seconds:g}",
            f"--grace={settings.grace_seconds:g}",
            *(f"--{name.replace('_', '-')}={value}" for name, value in request.options.items()),
        ],
        "env": [{"name": key, "value": value} for key, value in settings.env.items()],
        "envFrom": sources,
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "resources": {
            "requests": {"cpu": settings.cpu, "memory": settings.memory},
            "limits": {"cpu": settings.cpu_limit, "memory": settings.memory_limit},
        },
        "startupProbe": _probe("/v2/health/live", period=1, failures=settings.startup_seconds),
        "readinessProbe": _probe("/v2/health/ready", period=2, failures=2),
        "livenessProbe": _probe("/v2/health/live", period=10, failures=3),
        # All on the container: Knative accepts a pod security context only with a feature flag.
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": settings.run_as_user,
            "runAsGroup": settings.run_as_user,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            {"name": "scratch", "mountPath": "/tmp"},
            *({"name": volume, "mountPath": path, "readOnly": True} for volume, path, _ in _mounts(settings)),
        ],
    }
    return _without_empty(container)


def _mounts(settings: InferenceServiceSettings) -> list[tuple[str, str, str]]:
    """Volume, folder and ConfigMap. A ConfigMap's name may be too long for a volume."""
    return [(f"files-{i}", *mount) for i, mount in enumerate(sorted(settings.config_map_mounts.items()))]


def _probe(path: str, *, period: int, failures: int) -> dict[str, Any]:
    asked = {"path": path, "port": PORT}
    return {"httpGet": asked, "periodSeconds": period, "timeoutSeconds": 3, "failureThreshold": failures}


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, [])}
