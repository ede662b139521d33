"""Checks of a service that does not respond. tests/local checks a running one."""

from pathlib import Path

import dagster as dg
import pytest

from cifar_assets.assets.record import DATA_VERSION_TAG
from resources.inference_service import ServiceStatus
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.cifar10 import INFERENCE_SERVICE, inference_service_checks
from tests.fixtures.models import store_model
from tests.fixtures.orchestration import NotingService


class Status(NotingService):
    """Reports a model at an address where nothing listens."""

    digest: str

    def status(self) -> ServiceStatus:
        return ServiceStatus(True, "http://127.0.0.1:1", self.digest, "1", None)


class Broken(NotingService):
    """Raises when it is called."""

    def status(self) -> ServiceStatus:
        raise RuntimeError("the cluster is away")


def verdicts(folder: Path, serving: NotingService, digest: str | None) -> dict[str, tuple[bool, str]]:
    """The evaluations of the checks; their run succeeds."""
    with dg.DagsterInstance.ephemeral() as instance:
        if digest:
            made = dg.AssetMaterialization(INFERENCE_SERVICE, tags={DATA_VERSION_TAG: digest})
            instance.report_runless_asset_event(made)
        definitions = dg.Definitions(
            asset_checks=[inference_service_checks],
            jobs=[dg.define_asset_job("verify", dg.AssetSelection.checks(inference_service_checks))],
            resources={"object_store": LocalObjectStore(path=str(folder)), "serving": serving},
        )
        result = definitions.resolve_job_def("verify").execute_in_process(instance=instance)
        found = result.get_asset_check_evaluations()
    return {each.check_name: (each.passed, str(each.description)) for each in found}


def test_nothing_was_deployed_yet(tmp_path: Path) -> None:
    found = verdicts(tmp_path, NotingService(path="unused"), None)
    assert len(found) == 3
    assert all(not passed and "has no materialization" in text for passed, text in found.values())


def test_nothing_answers(tmp_path: Path) -> None:
    found = verdicts(tmp_path, NotingService(path="unused"), "f" * 64)
    assert len(found) == 3
    assert all(not passed and "nothing was started" in text for passed, text in found.values())


@pytest.mark.parametrize("stored", [True, False])
def test_the_service_goes_away_between_two_questions(tmp_path: Path, stored: bool) -> None:
    digest = store_model(LocalObjectStore(path=str(tmp_path)).models) if stored else "f" * 64
    found = verdicts(tmp_path, Status(path="unused", digest=digest), digest)
    assert found["serves_the_model"][0]
    assert not found["answers_as_evaluated"][0]
    assert not found["latency"][0]


def test_a_status_that_raises(tmp_path: Path) -> None:
    found = verdicts(tmp_path, Broken(path="unused"), "f" * 64)
    assert len(found) == 3
    assert all(not passed and "the cluster is away" in text for passed, text in found.values())
