from typing import Any

import pytest

from resources.kubernetes.job import JobClient
from tests.unit.pytorch_job.fake_cluster import KINDS, FakeCluster, Kind


@pytest.fixture(params=KINDS, ids=lambda kind: kind.job.kind)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def cluster(kind: Kind) -> FakeCluster:
    return FakeCluster(kind=kind)


@pytest.fixture
def client(cluster: FakeCluster) -> JobClient[Any]:
    return cluster.kind.client(cluster, cluster)
