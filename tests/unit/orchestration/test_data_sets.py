"""Several data sets in one code location: how they are declared, and that they never mix."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from cifar_assets.data_set import RESERVED_NAMES, DataSet, default_data_set, read_data_sets
from cifar_assets.dataset.stores import open_stores
from cifar_assets.definitions import build_definitions
from cifar_assets.deployment import resources_for, serving_for
from cifar_assets.prune.rules import Policy
from cifar_assets.prune.run import prune
from cifar_assets.sensors import build_sensors, training_in_flight
from resources.errors import ConfigError
from resources.mlflow.resource import LocalMlflow
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.settings import settings_of
from tests.unit.prune.conftest import Serving

FLOWERS = """\
- name: flowers
  source: pictures/flowers
  image_size: 64
  threshold: 0.7
"""
CLUSTER = {"DAGSTER_DEPLOYMENT": "kubernetes", "TRAINER_IMAGE": "trainer:1", "SERVER_IMAGE": "server:1"}


def declared(text: str) -> list[DataSet]:
    return read_data_sets(settings_of({"DATA_SETS": text}))


CIFAR10, SECOND = declared(FLOWERS)


def test_declaration_completes_itself(tmp_path: Path) -> None:
    assert default_data_set(settings_of({})) == CIFAR10
    assert (SECOND.port, SECOND.service, SECOND.folder) == (8081, "flowers", "flowers/")
    file = tmp_path / "sets.yaml"
    file.write_text(FLOWERS + "- {name: sea_life, source: fish, port: 9000}\n")
    found = declared(str(file))
    assert found[:2] == [CIFAR10, SECOND]
    assert (found[2].port, found[2].service) == (9000, "sea-life")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{FLOWERS}  colour: red\n",
            r"data set flowers is not valid\. colour: there is no such field; choose from classes, image_size",
        ),
        ("- {name: flowers}\n", "data set flowers is not valid. source: Field required"),
        ("- {source: x}\n", "data set number 1 is not valid. name: Field required"),
        ("- {name: Flowers, source: x}\n", "data set Flowers is not valid. name: .*small letters"),
        ("- {name: sea-life, source: x}\n", "data set sea-life is not valid. name: "),
        ("- {name: landing, source: x}\n", "name: 'landing' is a folder of the default data set"),
        ("- {name: a, source: x, image_size: 8}\n", "data set a is not valid. image_size: .*16"),
        ("- {name: a, source: x, threshold: 80}\n", "data set a is not valid. threshold: "),
        ("- {name: a, source: x, recipe: slow}\n", "recipe: 'slow' does not exist: choose one of baseline, best"),
        ("- {name: a, source: x, classes: [one]}\n", "data set a is not valid. classes: "),
        ("- {name: a, source: x}\n- {name: a, source: y}\n", "several data sets have the name a"),
        ("- {name: cifar10, source: x}\n", "several data sets have the name cifar10"),
        ("- {name: a, source: x, port: 8080}\n", r"several data sets have the port 8080 \(cifar10, a;"),
        ("- {name: a, source: x, service: cifar10}\n", "several data sets have the service cifar10"),
        (
            "- {name: cifar10_canary, source: x}\n",
            "service cifar10-canary of data set cifar10_canary has the name that the canary of data set cifar10 gets",
        ),
        (
            "- {name: a, source: x, service: b-canary}\n- {name: b, source: x}\n",
            "of data set a .* canary of data set b",
        ),
        ("- flowers\n", "data set number 1 is not valid"),
        ("name: a\nsource: x\n", "expected a list of data sets"),
        ("- {name: a\n", "DATA_SETS is not valid YAML"),
        (
            "- name: a\n  source: [https://x/a?sig=secret\n",
            r"DATA_SETS is not valid YAML: line 2: expected ',' or '\]'",
        ),
        ("{name: a, source: 'https://x/a?sig=secret'}", r"^DATA_SETS: the file cannot be read \(No such file"),
        ("https://x/a?sig=secret", r"^DATA_SETS: the file cannot be read \(No such file"),
        ("no/such/file.yaml", r"DATA_SETS \(no/such/file.yaml\): the file cannot be read"),
    ],
)
def test_error_names_place_data_set_and_field(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        declared(text)
    assert "secret" not in str(caught.value)


def names(definitions: dg.Definitions) -> dict[str, set[str]]:
    repository, graph = definitions.get_repository_def(), definitions.resolve_asset_graph()
    nodes = [graph.get(key) for key in graph.get_all_asset_keys()]
    return {
        "assets": {node.key.to_user_string() for node in nodes},
        "groups": {node.group_name for node in nodes},
        "checks": {f"{key.asset_key.to_user_string()} {key.name}" for key in graph.asset_check_keys},
        "jobs": {name for name in repository.job_names if not name.startswith("__")},
        "sensors": {sensor.name for sensor in repository.sensor_defs},
        "schedules": {schedule.name for schedule in repository.schedule_defs},
        "pools": {str(pool) for node in nodes for pool in node.pools or ()},
    }


def test_a_second_data_set_has_its_own_of_everything_and_the_first_is_unchanged() -> None:
    resources: dict[str, Any] = resources_for(settings_of({}), [CIFAR10, SECOND])
    first, second = (
        dg.Definitions.merge(build_definitions(each), dg.Definitions(resources=resources)) for each in (CIFAR10, SECOND)
    )
    own, others = names(first), names(second)
    both = names(dg.Definitions.merge(*map(build_definitions, (CIFAR10, SECOND)), dg.Definitions(resources=resources)))
    for kind in own:
        assert both[kind] == own[kind] | others[kind], kind
        assert own[kind] & others[kind] == ({"training"} if kind == "pools" else set()), kind
    assert others["jobs"] == {f"flowers_{name}" for name in own["jobs"] - {"argo_parity"}}
    assert others["assets"] == {
        name.replace("cifar10", "flowers") for name in own["assets"] - {"cifar10/argo_trained_model"}
    }


def test_every_resource_of_a_data_set_is_its_own() -> None:
    for environment in ({}, CLUSTER):
        settings = settings_of({**environment, "DATA_SETS": FLOWERS, "RECORDED_FRACTION": "1"})
        resources = resources_for(settings)
        assert resources["flowers_gate"].threshold == 0.7
        assert resources["flowers_mlflow"].registered_model == resources["flowers_mlflow"].experiment == "flowers"
        assert resources["flowers_object_store"].folder == "flowers/"
        assert resources["object_store"].folder == ""
    local, cluster = (
        resources_for(settings_of({"DATA_SETS": FLOWERS, "RECORDED_FRACTION": "1"})),
        resources["flowers_serving"],
    )
    assert (local["flowers_serving"].port, local["flowers_serving"].state_dir) == (8081, ".cifar/serving/flowers")
    assert local["flowers_serving"].options["model_name"] == "flowers"
    assert local["flowers_serving"].options["record_uri"].endswith("/served-traffic/flowers/")
    assert cluster.name == "flowers"
    assert cluster.settings.env["CIFAR_SERVING_MODEL_NAME"] == "flowers"
    assert cluster.settings.env["CIFAR_SERVING_RECORD_URI"] == "s3://served-traffic/flowers/"
    assert "CIFAR_SERVING_MODEL_NAME" not in serving_for(settings_of(CLUSTER)).settings.env


def test_server_settings_do_not_mix_data_sets() -> None:
    env = {"CIFAR_SERVING_RECORD_URI": "s3://mine/", "CIFAR_SERVING_MODEL_NAME": "mine", "CIFAR_SERVING_FEEDBACK": "1"}
    wanted = {"SERVER_SETTINGS": json.dumps({"env": env}), "RECORDED_FRACTION": "1", "DATA_SETS": FLOWERS}
    resources = resources_for(settings_of({**CLUSTER, **wanted}))
    assert resources["serving"].settings.env == {**env, "CIFAR_SERVING_RECORD_FRACTION": "1"}
    assert resources["flowers_serving"].settings.env == {
        "CIFAR_SERVING_FEEDBACK": "1",
        "CIFAR_SERVING_MODEL_NAME": "flowers",
        "CIFAR_SERVING_RECORD_FRACTION": "1",
        "CIFAR_SERVING_RECORD_URI": "s3://served-traffic/flowers/",
    }


def land(store: LocalObjectStore, name: str) -> None:
    store.raw.write(f"landing/{name}", b"PAR1")
    path = store.raw.local_path(f"landing/{name}")
    assert path is not None
    os.utime(path, (0, 0))


def test_a_landing_starts_a_run_of_its_own_data_set_only(tmp_path: Path) -> None:
    stores = {each.name: LocalObjectStore(path=str(tmp_path), folder=each.folder) for each in (CIFAR10, SECOND)}
    land(stores["flowers"], "a.parquet")
    with dg.DagsterInstance.ephemeral() as instance:

        def tick(data_set: DataSet) -> dg.SensorResult:
            resources = {data_set.named("object_store"): stores[data_set.name]}
            result = build_sensors(data_set)[0](dg.build_sensor_context(instance=instance, resources=resources))
            assert isinstance(result, dg.SensorResult)
            return result

        assert not tick(CIFAR10).run_requests
        requests = tick(SECOND).run_requests
        assert requests
        assert str(requests[0].run_key).startswith("flowers_landing-")
        assert list(requests[0].run_config["ops"]) == ["flowers__trained_model"]
        job = build_definitions(CIFAR10)
        resources = resources_for(settings_of({}), [CIFAR10, SECOND])
        definition = dg.Definitions.merge(job, dg.Definitions(resources=resources)).resolve_job_def("train")
        instance.create_run_for_job(definition, status=dg.DagsterRunStatus.STARTED)
        assert training_in_flight(instance, CIFAR10)
        assert training_in_flight(instance, SECOND) is None
        assert tick(SECOND).run_requests


def test_pruning_of_one_data_set_leaves_the_objects_of_others(tmp_path: Path) -> None:
    old, digest = time.time() - 90 * 86_400, "a" * 64
    keys = [
        *(f"raw-data/{{}}versions/{digest}/manifest.json", "raw-data/{}objects/x.tar", "raw-data/{}to-label/b/x.png"),
        *(f"processed-data/{{}}{digest}/manifest.json", "processed-data/{}shards/x", "models/{}checkpoints/x/1"),
        *(f"models/{{}}{digest}/part", "models/{}pipes/a/b/c", "served-traffic/{}2026-01-01/000000-a.parquet"),
    ]
    mlflow = LocalMlflow(path=str(tmp_path / "mlflow"))
    for pruned, other in ((CIFAR10, SECOND), (SECOND, CIFAR10)):
        root = tmp_path / pruned.name
        store = LocalObjectStore(path=str(root), folder=pruned.folder)
        for data_set in (pruned, other):
            for key in keys:
                if "manifest" in key and data_set is pruned:
                    continue  # it would have to be a real one
                LocalObjectStore(path=str(root)).root().write(key.format(data_set.folder), b"x")
        for path in root.rglob("*"):
            os.utime(path, (old, old))
        with dg.DagsterInstance.ephemeral() as instance:
            prune(pruned, Policy(), instance, store, mlflow, Serving(), apply=True, say=lambda _: None)
        left = {info.key for info in store.root().list()}
        assert left == {key.format(other.folder) for key in keys}


def test_names_of_folders_are_reserved() -> None:
    product = Path(__file__).parents[3] / "cifar_assets"
    prefixes = {
        line.partition('"')[2].partition("/")[0]
        for path in product.rglob("*.py")
        for line in path.read_text().splitlines()
        if "_PREFIX" in line and line.rstrip().endswith('/"')
    }
    assert {"landing", "objects", "shards"} <= prefixes
    assert {name for name in prefixes if name.isidentifier()} <= RESERVED_NAMES


def test_commands_read_the_folder_of_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_SETS", FLOWERS)
    assert open_stores(str(tmp_path)).raw.uri() == (tmp_path / "raw-data").as_uri() + "/"
    assert open_stores(str(tmp_path), "flowers").raw.uri() == (tmp_path / "raw-data" / "flowers").as_uri() + "/"
    with pytest.raises(ConfigError, match=r"There is no data set 'flower': choose one of cifar10, flowers"):
        open_stores(str(tmp_path), "flower")


def test_the_code_location_loads_with_two_data_sets() -> None:
    script = (
        "import json; from cifar_assets.definitions import defs; from tests.unit.orchestration.test_data_sets import "
        "names; print(json.dumps(sorted(names(defs)['assets'])))"
    )
    for environment in ({}, CLUSTER | {"AWS_ENDPOINT_URL": "http://minio.invalid:9000"}):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **environment, "DATA_SETS": FLOWERS},
            check=True,
            capture_output=True,
            text=True,
        )
        assert "flowers/inference_service" in json.loads(done.stdout.splitlines()[-1])
