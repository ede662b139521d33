"""Secrets planted in every setting: no error, traceback or manifest contains one.

tests/local/test_planted_secrets.py searches everything that a run writes.
"""

import json
import traceback
from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest

from cifar_assets.assets.datasets import RawDatasetConfig
from cifar_assets.deployment import resources_for
from cifar_assets.pipeline_steps.__main__ import main as pipeline_step
from cifar_assets.training.recipes import RECIPES
from cifar_assets.training.spec import JobSpec, parse_spec
from resources.errors import ConfigError
from resources.inference_service import DeployRequest
from resources.inference_service.kserve.manifest import build_inference_service_manifest
from resources.mlflow.target import MlflowTarget
from resources.object_store import open_store
from resources.trainer.interface import TrainingScale
from tests.fixtures.cifar10 import DATA_SET
from tests.fixtures.settings import settings_of

SECRET = "hush"
ADDRESS = f"http://user:{SECRET}@host:5000"
SIGNED = f"https://host/x?X-Amz-Signature={SECRET}"
ENVIRONMENT = {
    "DAGSTER_DEPLOYMENT": "kubernetes",
    "AWS_ENDPOINT_URL": "http://minio:9000",
    "AWS_ACCESS_KEY_ID": f"{SECRET}-key",
    "AWS_SECRET_ACCESS_KEY": f"{SECRET}-secret",
    "AWS_SESSION_TOKEN": f"{SECRET}-token",
    "MLFLOW_TRACKING_URI": "http://mlflow:5000",
    "MODEL_SIGNING_KEY": f"{SECRET}-private",
    "TRAINER_IMAGE": "trainer:1",
    "SERVER_IMAGE": "server:1",
}
DIGEST = "a" * 64
SPEC = JobSpec(
    dataset_uri=f"s3://processed-data/{DIGEST}/",
    dataset_digest=DIGEST,
    recipe=next(iter(RECIPES.values())),
    output_uri="s3://models/",
    mlflow=MlflowTarget(tracking_uri="http://mlflow:5000"),
)


def resources(monkeypatch: pytest.MonkeyPatch, **variables: str) -> dict[str, Any]:
    """The resources of the definitions in this environment, resolved as Dagster does."""
    for name, value in (ENVIRONMENT | variables).items():
        monkeypatch.setenv(name, value)
    found = resources_for(settings_of(ENVIRONMENT | variables))
    return {name: found[name].process_config_and_initialize() for name in ("object_store", "mlflow")} | {
        name: found[name] for name in ("trainer", "serving", "argo")
    }


def refusal(call: Callable[[], object]) -> str:
    """The error with everything that Dagster records about it."""
    with pytest.raises(ConfigError) as caught:
        call()
    return "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", f"http://user:{SECRET}@minio:9000"),
        ("AWS_ENDPOINT_URL", f"user:{SECRET}@minio:9000"),
        ("AWS_ENDPOINT_URL_S3", SIGNED),
        ("MLFLOW_TRACKING_URI", ADDRESS),
        ("MLFLOW_TRACKING_URI", f"postgresql://user:{SECRET}@db/mlflow"),
        ("TRAINER_MLFLOW_TRACKING_URI", ADDRESS),
        ("SERVER_URL", ADDRESS),
        ("MODEL_PUBLIC_KEY", SECRET),
        ("TRAINER_JOB", json.dumps({"env": {"MLFLOW_TRACKING_PASSWORD": SECRET}})),
        ("TRAINER_JOB", json.dumps({"env": {"PROXY": ADDRESS}})),
        ("TRAINER_JOB", json.dumps({"replicas": SECRET})),
        ("TRAINER_JOB", json.dumps({"unknown": SECRET})),
        ("TRAINER_JOB", f'{{"a": {SECRET}'),
        ("SERVER_SETTINGS", json.dumps({"env": {"API_KEY": SECRET}})),
        ("SERVER_SETTINGS", json.dumps({"min_replicas": SECRET})),
        ("SERVER_SETTINGS", f'{{"a": {SECRET}'),
        ("ARGO_PARAMETERS", f"[{SECRET}"),
    ],
)
def test_setting_with_a_secret_is_refused_and_not_shown(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def use() -> None:
        found = resources(monkeypatch, **{name: value})
        found["object_store"].root()
        _ = found["mlflow"].uri

    text = refusal(use)
    assert SECRET not in text
    assert name.removesuffix("_S3") in text


@pytest.mark.parametrize(
    "call",
    [
        lambda: open_store(f"s3://key:{SECRET}@bucket/x"),
        lambda: open_store(SIGNED),
        lambda: RawDatasetConfig(source=SIGNED).resolved_source(DATA_SET),
        lambda: parse_spec(SPEC.model_dump_json().replace("http://mlflow:5000", ADDRESS), "the test"),
        lambda: parse_spec(json.dumps({"output_uri": f"s3://k:{SECRET}@models"}), "the test"),
    ],
    ids=["s3 address", "unknown address", "config", "job spec", "incomplete job spec"],
)
def test_address_with_a_secret_is_refused_and_not_shown(call: Callable[[], object]) -> None:
    assert SECRET not in refusal(call)


def test_step_of_the_other_pipelines_refuses_an_address_with_a_secret(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ADDRESS)
    assert pipeline_step(["--store", str(tmp_path), "data", "--run=r", f"--outputs={tmp_path}"]) != 0
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    assert "MLFLOW_TRACKING_URI" in printed.err


def test_manifests_hold_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    found = resources(monkeypatch)
    store = found["object_store"]
    scale = TrainingScale()
    jobs = [
        found["trainer"].job_config(kind, SPEC, scale, store.child_environment())
        for kind in ("pytorch_job", "train_job")
    ]
    request = DeployRequest("s3://models/a/", DIGEST, "1")
    service = build_inference_service_manifest(found["serving"].settings, request, name="cifar10", namespace="cifar")
    assert SECRET not in json.dumps([*(job.model_dump() for job in jobs), service], default=str)
    assert store.child_environment()["AWS_SESSION_TOKEN"] == f"{SECRET}-token"  # there was something to redact


def test_resolved_resource_shows_the_names_of_its_variables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    config = resources_for(settings_of(ENVIRONMENT))["object_store"]
    assert config.secret_key == dg.EnvVar("AWS_SECRET_ACCESS_KEY")
    assert SECRET not in repr(config)
