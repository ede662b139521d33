import pytest

from resources.pytorch_job.client import PyTorchJobClient
from tests.unit.pytorch_job.fake_cluster import FakeCluster


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def client(cluster: FakeCluster) -> PyTorchJobClient:
    return PyTorchJobClient(cluster, cluster)
