"""The story of signed models: trained and signed, verified, served; what is not as signed is refused."""

import subprocess
import sys

import pytest
from Crypto.PublicKey import ECC

from cifar_assets.assets.record import data_version
from cifar_assets.model_package import CARD_FILE
from resources.inference_service.client import InferenceClient
from resources.model_signature import PUBLIC_KEY_VARIABLE, SIGNATURE_FILE, SIGNING_KEY_VARIABLE
from resources.trainer.contract import EXIT_BAD_SPEC
from tests.fixtures.cifar10 import TRAINED_MODEL
from tests.fixtures.workspace import SMALL_TRAINING, Workspace

pytestmark = pytest.mark.timeout(1800)
DATA = "cifar10/raw_dataset,cifar10/processed_dataset"
MODEL = "cifar10/trained_model,cifar10/inference_service"
ONE_EPOCH = {**SMALL_TRAINING, "overrides": {**SMALL_TRAINING["overrides"], "epochs": 1}}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("keys")
    key = ECC.generate(curve="P-256")
    for name, each in ((SIGNING_KEY_VARIABLE, key), (PUBLIC_KEY_VARIABLE, key.public_key())):
        (folder / name).write_text(str(each.export_key(format="PEM")))
    return {name: str(folder / name) for name in (SIGNING_KEY_VARIABLE, PUBLIC_KEY_VARIABLE)}


def trained(workspace: Workspace) -> str:
    with workspace.instance() as instance:
        event = instance.get_latest_materialization_event(TRAINED_MODEL)
    assert event is not None
    assert event.asset_materialization is not None
    return data_version(event.asset_materialization)


def served(workspace: Workspace) -> str:
    url = f"http://127.0.0.1:{workspace.environment['INFERENCE_SERVICE_PORT']}"
    return InferenceClient(url, timeout=300).served_model().model_digest


def test_only_signed_models_are_served(workspace: Workspace, keys: dict[str, str]) -> None:
    keys = {**keys, "ACCURACY_THRESHOLD": "0"}
    public = {name: value for name, value in keys.items() if name != SIGNING_KEY_VARIABLE}
    done = workspace.materialize(f"{DATA},{MODEL}", {"trained_model": ONE_EPOCH}, **keys)
    assert done.returncode == 0, done.stdout
    good = served(workspace)
    package = workspace.folder / ".cifar/store/models" / good
    options = ["--signature", str(package / SIGNATURE_FILE), "--public_key", public[PUBLIC_KEY_VARIABLE]]
    verified = subprocess.run([sys.executable, "-m", "model_signing", "verify", "key", str(package), *options])
    assert verified.returncode == 0

    done = workspace.materialize(MODEL, {"trained_model": {**ONE_EPOCH, "seed": 1}}, **public)
    assert done.returncode != 0
    assert f"has no {SIGNATURE_FILE}, but {PUBLIC_KEY_VARIABLE} is set" in done.stdout
    assert (trained(workspace) != good, served(workspace)) == (True, good)

    card = package / CARD_FILE
    card.write_bytes(card.read_bytes() + b"Certified.")
    done = workspace.materialize("cifar10/inference_service", {"inference_service": {"model_digest": good}}, **public)
    assert done.returncode != 0
    assert f"{card.as_uri()} is not as signed" in done.stdout
    assert served(workspace) == good
    place = ["--model-uri", f"{package.as_uri()}/", "--model-digest", good, "--port", "0"]
    done = workspace.python("-m", "cifar_assets.serving", *place, **public)
    assert done.returncode == EXIT_BAD_SPEC
    assert f"Not serving: {card.as_uri()} is not as signed" in done.stdout
