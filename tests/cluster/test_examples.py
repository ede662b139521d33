"""The examples on a real cluster, with the image of the stories."""

import pytest

from examples.pytorch_job import defs
from tests.cluster.conftest import STORY_IMAGE, Minio


def test_pytorch_job(namespace: str, minio: Minio, no_jobs_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"EXAMPLE_IMAGE": STORY_IMAGE, "EXAMPLE_STORE": "s3://stories/example", "EXAMPLE_NAMESPACE": namespace}
    for name, value in {**minio.environment(), **variables}.items():
        monkeypatch.setenv(name, value)
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process()
    (materialization,) = result.asset_materializations_for_node("language_model")
    assert materialization.metadata["loss"].value == 0.125
    assert str(materialization.metadata["pytorch_job"].value).startswith(f"{namespace}/pytorch-job-")
