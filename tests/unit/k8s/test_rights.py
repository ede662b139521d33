"""Each role has the rights it needs in the object store: tests/local/test_store_setup.py tests them on real servers."""

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


def documents(folder: str) -> list[dict[str, Any]]:
    names = yaml.safe_load((K8S / folder / "kustomization.yaml").read_text())["resources"]
    return [d for name in names for d in yaml.safe_load_all((K8S / folder / name).read_text()) if d]


def test_no_manifest_but_those_of_the_platform_names_the_root_user() -> None:
    root = re.compile(r"name: object-store\b(?!-)|\[object-store\]")
    holders = {path.relative_to(K8S).as_posix() for path in K8S.rglob("*.yaml") if root.search(path.read_text())}
    assert holders == {"platform/minio.yaml", "platform/store.yaml", "overlays/seaweedfs/seaweedfs.yaml"}


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


def test_region_and_prefix_are_the_same_in_both_namespaces() -> None:
    (platform,) = [d["data"] for d in documents("platform") if d["kind"] == "ConfigMap"]
    (access,) = [d["data"] for d in documents("access") if d["kind"] == "ConfigMap"]
    for name in ("AWS_REGION", "CIFAR_BUCKET_PREFIX"):
        assert platform[name] == access[name]
