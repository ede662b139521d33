"""Each role has the rights it needs in the object store and on the network.

tests/local/test_store_setup.py tests them on a real MinIO, tests/cluster/test_network.py on a real network.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifar_assets.deployment import trainer_for
from resources.inference_service.kserve.config import InferenceServiceSettings
from resources.object_store.resource import LocalObjectStore
from resources.object_store.setup import ROLES, policy_of, user_of
from tests.fixtures.settings import settings_of

K8S = Path(__file__).parents[3] / "k8s"
NAMESPACES = {
    "platform": "cifar-platform",
    "access": "cifar",
    "dagster": "cifar",
    "argo": "cifar",
    "trainjob": "cifar",
    "monitoring": "cifar",
}


def documents(folder: str) -> list[dict[str, Any]]:
    names = yaml.safe_load((K8S / folder / "kustomization.yaml").read_text())["resources"]
    return [d for name in names for d in yaml.safe_load_all((K8S / folder / name).read_text()) if d]


POLICIES = [(folder, d) for folder in NAMESPACES for d in documents(folder) if d["kind"] == "NetworkPolicy"]


def test_no_manifest_but_those_of_the_platform_names_the_root_user() -> None:
    root = re.compile(r"name: object-store\b(?!-)|\[object-store\]")
    holders = {path.relative_to(K8S).as_posix() for path in K8S.rglob("*.yaml") if root.search(path.read_text())}
    assert holders == {"platform/minio.yaml", "platform/store.yaml"}


def test_default_secrets_are_those_of_the_roles() -> None:
    trainer = trainer_for(settings_of({"TRAINER_IMAGE": "x"}), LocalObjectStore())
    assert trainer.pytorch_job
    assert trainer.pytorch_job.env_secrets == ["object-store-trainer"]
    for job in (trainer.pytorch_job, trainer.train_job):
        assert job
        secrets = {name: (ref.secret, ref.optional) for name, ref in job.secret_env.items()}
        assert secrets == {"MODEL_SIGNING_KEY": ("model-signing", True)}
    assert InferenceServiceSettings(image="x").env_secrets == ["object-store-server"]


def test_secrets_of_every_role_are_created() -> None:
    script = (K8S / "create-secrets").read_text()
    (line,) = [line for line in script.splitlines() if line.strip().startswith("for role in ")]
    assert set(line.strip().removeprefix("for role in ").removesuffix("; do").split()) == set(ROLES)
    assert {user_of(role) for role in ROLES} == {f"cifar-{role}" for role in ROLES}
    assert "AWS_ACCESS_KEY_ID cifar-$role" in script


@pytest.mark.parametrize("role", ROLES)
def test_policy_names_actions_and_buckets(role: str) -> None:
    text = json.dumps(policy_of(role, "team-"))
    assert '"s3:*"' not in text
    assert "CreateBucket" not in text
    assert "arn:aws:s3:::*" not in text
    assert text.count("arn:aws:s3:::") == text.count("arn:aws:s3:::team-")


@pytest.mark.parametrize("folder", ["platform", "access"])
def test_namespace_denies_ingress_and_egress(folder: str) -> None:
    (deny,) = [d for where, d in POLICIES if where == folder and d["metadata"]["name"] == "deny-all"]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize(("folder", "policy"), POLICIES, ids=[f"{f}-{p['metadata']['name']}" for f, p in POLICIES])
def test_no_policy_allows_traffic_to_or_from_everyone(folder: str, policy: dict[str, Any]) -> None:
    spec = policy["spec"]
    for rule in spec.get("ingress", []):
        assert rule.get("from"), "open to everyone"
        for peer in rule["from"]:
            assert peer.get("podSelector") or peer["namespaceSelector"] != {}
    for rule in spec.get("egress", []):
        if not rule.get("to"):  # DNS and the cluster's API are not selected by labels
            assert {port["port"] for port in rule["ports"]} in ({53}, {443, 6443, 8443})


def test_both_ends_of_a_connection_are_allowed() -> None:
    """Egress to a labeled pod of ours has a matching ingress rule there."""
    incoming = {
        (NAMESPACES[folder], json.dumps(policy["spec"]["podSelector"]), json.dumps(selector))
        for folder, policy in POLICIES
        for selector in sources(policy)
    }
    for folder, policy in POLICIES:
        for rule in policy["spec"].get("egress", []):
            for peer in rule.get("to", []):
                namespace = peer.get("namespaceSelector", {}).get("matchLabels", {})
                target = namespace.get("kubernetes.io/metadata.name", NAMESPACES[folder])
                found = {
                    selector
                    for where, pods, selector in incoming
                    if (where, pods) == (target, json.dumps(peer["podSelector"]))
                }
                assert any(covers(json.loads(selector), policy["spec"]["podSelector"]) for selector in found), (
                    f"{policy['metadata']['name']} goes out to {peer} in {target}, which lets in {found}"
                )


def sources(policy: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        peer["podSelector"]
        for rule in policy["spec"].get("ingress", [])
        for peer in rule["from"]
        if "podSelector" in peer
    ]


def covers(wide: dict[str, Any], narrow: dict[str, Any]) -> bool:
    """Whether a selector admits all pods of another one: the same key, and all its values."""
    (wide_key, wide_values), (key, values) = label(wide), label(narrow)
    return wide_key == key and (wide_values is None or (values is not None and values <= wide_values))


def label(selector: dict[str, Any]) -> tuple[str, set[str] | None]:
    if "matchLabels" in selector:
        ((key, value),) = selector["matchLabels"].items()
        return key, {value}
    (expression,) = selector["matchExpressions"]
    return expression["key"], set(expression["values"]) if expression["operator"] == "In" else None


def test_region_and_prefix_are_the_same_in_both_namespaces() -> None:
    (platform,) = [d["data"] for d in documents("platform") if d["kind"] == "ConfigMap"]
    (access,) = [d["data"] for d in documents("access") if d["kind"] == "ConfigMap"]
    for name in ("AWS_REGION", "CIFAR_BUCKET_PREFIX"):
        assert platform[name] == access[name]
