from typing import Any

import pytest

from resources.train_job.client import TrainJobClient
from tests.unit.pytorch_job.fake_cluster import TRAIN_JOB, FakeCluster


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(kind=TRAIN_JOB)


@pytest.fixture
def client(cluster: Any) -> TrainJobClient:
    return TrainJobClient(cluster, cluster)
