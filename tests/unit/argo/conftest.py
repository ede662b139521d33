import pytest

from resources.argo.client import WorkflowClient
from tests.unit.argo.fake_argo import FakeArgo


@pytest.fixture
def argo() -> FakeArgo:
    return FakeArgo()


@pytest.fixture
def client(argo: FakeArgo) -> WorkflowClient:
    return WorkflowClient(argo, argo)
