"""Signed models in a cluster, set up as in docs/signing.md: the trainer's pod signs, the gate and the server verify."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from Crypto.PublicKey import ECC

from cifar_assets.demo import FOUR_ASSETS
from resources.errors import DeployError
from resources.model_signature import PUBLIC_KEY_VARIABLE, SIGNATURE_FILE
from tests.cluster.kubectl import PATIENCE, kubectl
from tests.cluster.platform import Platform
from tests.cluster.serving_story import service, store_model
from tests.fixtures.tiny_data import write_drawn_images
from tests.fixtures.workspace import ROOT, SMALL_TRAINING, Workspace


@pytest.fixture
def signing(platform: Platform) -> Iterator[None]:
    """The trainer's pods have a private key, and all others its public key."""
    if "serving.kserve.io" not in kubectl("api-versions"):
        pytest.skip("the cluster has no KServe")
    inside = ("-n", platform.namespace)
    key = ECC.generate(curve="P-256")
    private, public = (str(each.export_key(format="PEM")) for each in (key, key.public_key()))
    kubectl(*inside, "create", "secret", "generic", "model-signing", f"--from-literal=private.pem={private}")
    patch = (*inside, "patch", "configmap", "cifar-platform", "--patch")
    kubectl(*patch, json.dumps({"data": {PUBLIC_KEY_VARIABLE: public}}))
    yield
    kubectl(*inside, "delete", "inferenceservices", "--all", "--wait=true", PATIENCE)
    kubectl(*inside, "delete", "secret", "model-signing")
    kubectl(*patch, json.dumps({"data": {PUBLIC_KEY_VARIABLE: None}}))


def test_only_signed_models_are_served(platform: Platform, signing: None, tmp_path: Path) -> None:
    shutil.copy(ROOT / "dagster.yaml", tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    write_drawn_images(source, train=1200, test=600)
    environment = {
        **platform.environment(),
        "PYTHONPATH": str(ROOT),
        "CIFAR10_SOURCE": str(source),
        "ACCURACY_THRESHOLD": "0",
        "SERVER_SETTINGS": json.dumps({"cpu": "50m", "max_replicas": 1}),
    }
    training = {**SMALL_TRAINING, "scale": {"cpu": "200m", "memory": "2Gi"}}
    done = Workspace(tmp_path, environment).materialize(FOUR_ASSETS, {"trained_model": training})
    assert done.returncode == 0, done.stdout
    serving = service(platform.namespace, env_config_maps=["cifar-platform"], env_secrets=["object-store-server"])
    signed = serving.status().model_digest
    assert platform.store().at("models").exists(f"{signed}/{SIGNATURE_FILE}")
    with pytest.raises(DeployError, match=f"has no {SIGNATURE_FILE}, but {PUBLIC_KEY_VARIABLE} is set"):
        serving.deploy(store_model(platform.store(), 1, "unsigned"))
    assert serving.status().model_digest == signed
