"""The examples on a real cluster, with the image of the stories."""

from pathlib import Path

import dagster as dg
import pytest

from examples.pytorch_job import defs
from tests.cluster.conftest import Minio
from tests.cluster.kinds import STORY_IMAGE, TRAIN_JOB, JobKind

COMPONENT_PROJECT = Path(__file__).parents[2] / "examples/job_component"


@pytest.fixture
def environment(namespace: str, minio: Minio, no_jobs_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"EXAMPLE_IMAGE": STORY_IMAGE, "EXAMPLE_STORE": "s3://stories/example", "EXAMPLE_NAMESPACE": namespace}
    for name, value in {**minio.environment(), **variables}.items():
        monkeypatch.setenv(name, value)


def test_pytorch_job(namespace: str, environment: None) -> None:
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process()
    (materialization,) = result.asset_materializations_for_node("language_model")
    assert materialization.metadata["loss"].value == 0.125
    assert str(materialization.metadata["pytorch_job"].value).startswith(f"{namespace}/pytorch-job-")


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [TRAIN_JOB], indirect=True, ids=["TrainJob"])
def test_job_component(kind: JobKind, namespace: str, environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kind.prepare(namespace, runtime="cifar-trainer")
    monkeypatch.syspath_prepend(COMPONENT_PROJECT)
    defs = dg.load_from_defs_folder(path_within_project=COMPONENT_PROJECT / "job_component")
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process()
    (materialization,) = result.asset_materializations_for_node("language_model")
    assert materialization.metadata["loss"].value == 0.125
