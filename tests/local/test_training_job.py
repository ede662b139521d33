"""One job from spec to published model, as a separate process."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param

from cifar_assets.contracts import BASELINE_MODEL_KEY, CLASSES
from cifar_assets.model_package import (
    CARD_FILE,
    ENVIRONMENT_FILE,
    IDENTITY_FILES,
    LOG_FILE,
    PERFORMANCE_FILE,
    SBOM_FILE,
    read_manifest,
)
from cifar_assets.training.data import open_data
from cifar_assets.training.device import Processor
from cifar_assets.training.networks import ResNet18
from cifar_assets.training.package import measure, predict
from resources.trainer.contract import EXIT_BAD_SPEC
from tests.unit.training.jobs import Workplace, json_file, run_trainer
from tests.unit.training.small_dataset import RAW_DIGEST

PIPES_CONTEXT = {
    "asset_keys": ["cifar10/trained_model"],
    "code_version_by_asset_key": {"cifar10/trained_model": None},
    "provenance_by_asset_key": {"cifar10/trained_model": None},
    "partition_key": None,
    "partition_key_range": None,
    "partition_time_window": None,
    "run_id": "run-1",
    "job_name": "job",
    "retry_number": 0,
    "extras": {},
}


def pipes_environment(messages: dict[str, str]) -> dict[str, str]:
    return {
        DAGSTER_PIPES_CONTEXT_ENV_VAR: encode_param({"data": PIPES_CONTEXT}),
        DAGSTER_PIPES_MESSAGES_ENV_VAR: encode_param(messages),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace.make(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def finished(place: Workplace) -> tuple[str, list[dict[str, Any]]]:
    """Output and Pipes messages of one whole job."""
    messages = place.folder / "messages"
    spec = place.spec(recipe_fields={"epochs": 4}, seed=5, write_baseline_copies=True)
    done = run_trainer(spec, env=pipes_environment({"path": str(messages)}))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, [json.loads(line) for line in messages.read_text().splitlines()]


def test_package_is_complete_and_records_its_origin(place: Workplace, finished: object) -> None:
    digest, metrics = place.only_model()
    manifest = read_manifest(place.models().at(digest), digest)
    assert (manifest.dataset_digest, manifest.raw_digest, manifest.seed) == (place.digest, RAW_DIGEST, 5)
    assert (manifest.classes, manifest.image_size) == (CLASSES, 32)
    assert set(manifest.files) == set(IDENTITY_FILES)
    stored = {info.key.partition("/")[2] for info in place.models().list(f"{digest}/")}
    beside = {PERFORMANCE_FILE, ENVIRONMENT_FILE, CARD_FILE, SBOM_FILE, LOG_FILE, "manifest.json"}
    assert stored == {*IDENTITY_FILES, *beside}
    assert metrics["dataset_digest"] == place.digest
    assert metrics["raw_digest"] == RAW_DIGEST
    assert place.checkpoints() == []


def test_the_metrics_are_those_of_the_stored_model(place: Workplace, finished: object) -> None:
    _, metrics = place.only_model()
    network = place.only_network()
    test = open_data(place.spec(), torch.device("cpu")).test
    expected = measure(
        predict(network, test, Processor(torch.device("cpu"), torch.float32)), test.labels.numpy(), CLASSES
    )
    assert metrics["test_accuracy"] == expected["accuracy"]
    assert metrics["test_loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert metrics["confusion_matrix"] == expected["confusion_matrix"]
    assert metrics["test_images"] == 40
    assert metrics["onnx_max_difference"] <= 1e-3 * max(1.0, metrics["onnx_largest_logit"])
    assert metrics["views"] == place.spec().recipe.views == "mirrored"
    assert [record["epoch"] for record in metrics["history"]] == [0, 1, 2, 3]
    assert "seconds" not in metrics["history"][0]


def test_performance_environment_and_model_card_are_stored(place: Workplace, finished: object) -> None:
    digest, metrics = place.only_model()
    performance = json_file(place.models(), f"{digest}/{PERFORMANCE_FILE}")
    assert {"train", "validate", "checkpoint", "test", "export"} <= set(performance["seconds_per_phase"])
    assert performance["images_per_second"] > 0
    assert performance["resumed_from_step"] is None
    environment = json_file(place.models(), f"{digest}/{ENVIRONMENT_FILE}")
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert (environment["device"], environment["precision"], environment["processes"]) == ("cpu", "float32", 1)
    card = place.models().read(f"{digest}/{CARD_FILE}").decode()
    assert f"{100 * metrics['test_accuracy']:.2f} % of 40 images" in card
    assert place.digest in card
    assert all(f"| recall of {name} |" in card for name in CLASSES)


def test_the_baseline_weights_object_is_a_copy(place: Workplace, finished: object) -> None:
    network = place.only_network().network
    copy = torch.load(io.BytesIO(place.models().read(BASELINE_MODEL_KEY)), weights_only=True)
    assert isinstance(network, ResNet18)
    expected = network.torchvision_state_dict()
    assert copy.keys() == expected.keys()
    assert all(torch.equal(value, copy[name]) for name, value in expected.items())


def test_dagster_receives_epochs_and_result(place: Workplace, finished: tuple[str, list[dict[str, Any]]]) -> None:
    output, messages = finished
    digest, metrics = place.only_model()
    assert [message["method"] for message in (messages[0], messages[-1])] == ["opened", "closed"]
    assert not messages[-1]["params"]
    custom = [m["params"]["payload"] for m in messages if m["method"] == "report_custom_message"]
    epochs = [payload for payload in custom if payload["type"] == "epoch"]
    assert [(payload["epoch"], payload["epochs"]) for payload in epochs] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for payload, record in zip(epochs, metrics["history"], strict=True):
        for name in ("train_loss", "validation_loss", "validation_accuracy", "learning_rate"):
            assert payload[name] == record[name]
        assert payload["images_per_second"] > 0
    assert custom[-1] == {
        "type": "result",
        "model_digest": digest,
        "model_uri": place.models().uri(f"{digest}/"),
        "mlflow_run_id": None,
        "mlflow_model_version": None,
        "mlflow_unsent": [],
        "resumed_from": None,
    }
    logged = [m["params"]["message"] for m in messages if m["method"] == "log"]
    assert sum(line.startswith("Epoch ") for line in output.splitlines()) == 4
    assert not any(line.startswith("Epoch ") for line in logged), "Dagster shows the output as well"


def test_the_same_job_gives_the_same_model(place: Workplace, finished: object) -> None:
    """As a separate process, with messages through the object store and the spec in a file."""
    digest, _ = place.only_model()
    spec = place.spec("again", recipe_fields={"epochs": 4}, seed=5)
    done = run_trainer(spec, env=pipes_environment({"store_uri": place.models("messages-store").uri()}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert place.only_model("again")[0] == digest
    stored = [place.models("messages-store").read(info.key) for info in place.models("messages-store").list()]
    assert b'"result"' in b"".join(stored)


def refused(text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cifar_assets.training", "--spec", "-"], input=text, capture_output=True, text=True
    )
    assert done.returncode == EXIT_BAD_SPEC, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def test_invalid_spec_has_its_own_exit_code(place: Workplace) -> None:
    spec = json.loads(place.spec("nothing").model_dump_json())
    spec["recipe"]["epochs"] = 0
    assert "recipe.epochs" in refused(json.dumps(spec))
    assert not (place.folder / "nothing").exists()


def test_diverging_loss_has_its_own_exit_code(place: Workplace) -> None:
    spec = place.spec("diverges", recipe_fields={"learning_rate": 1e30})
    assert "Lower learning_rate" in refused(spec.model_dump_json())


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_damaged_data_has_its_own_exit_code_and_names_the_object(place: Workplace, tmp_path: Path, damage: str) -> None:
    other = Workplace.make(tmp_path)
    shard = next((tmp_path / "processed-data").rglob("*.safetensors"))
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1] + b"\0\0")
    assert shard.name in refused(other.spec().model_dump_json())
    assert other.published() == {}
