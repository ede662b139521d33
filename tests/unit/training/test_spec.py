import json

import pytest

from cifar_assets.training.recipes import get_recipe
from cifar_assets.training.spec import JobSpec, parse_spec
from resources.errors import ConfigError

DIGEST = "ab" * 32


def make_spec(**changes: object) -> JobSpec:
    values: dict[str, object] = {
        "dataset_uri": f"file:///store/processed-data/{DIGEST}/",
        "dataset_digest": DIGEST,
        "recipe": get_recipe("resnet18").model_dump(),
        "output_uri": "file:///store/models/",
    }
    return JobSpec.model_validate(values | changes)


def test_spec_survives_a_json_round_trip() -> None:
    spec = make_spec(seed=7, mlflow={"tracking_uri": "sqlite:///x.db", "tags": {"a": "b"}})
    assert parse_spec(spec.model_dump_json(), "here") == spec


def test_the_processed_bucket_is_the_folder_above_the_dataset() -> None:
    assert make_spec().processed_uri == "file:///store/processed-data/"
    without_slash = make_spec(dataset_uri=f"s3://processed-data/{DIGEST}")
    assert without_slash.processed_uri == "s3://processed-data/"


def test_identity_depends_on_what_determines_the_weights() -> None:
    base = make_spec()
    assert make_spec(seed=1).identity != base.identity
    assert make_spec(recipe=get_recipe("resnet18", {"epochs": 2}).model_dump()).identity != base.identity
    other = "cd" * 32
    assert make_spec(dataset_uri=f"file:///p/{other}", dataset_digest=other).identity != base.identity


def test_identity_does_not_depend_on_where_and_how_it_runs() -> None:
    elsewhere = make_spec(
        dataset_uri=f"s3://processed-data/{DIGEST}/",
        output_uri="s3://models/",
        mlflow={"tracking_uri": "http://mlflow:5000"},
        execution={"threads": 1, "checkpoint_every_steps": 3, "keep_checkpoints": 9},
        write_baseline_copies=True,
    )
    assert elsewhere.identity == make_spec().identity


EARLIER_FIELDS = {"ema_decay": 0.9, "ema_every": 5, "final_learning_rate": 0.0, "muon_momentum": 0.6}


def earlier_spec(network: str) -> str:
    """A spec that an earlier release wrote."""
    spec = json.loads(make_spec().model_dump_json())
    spec["write_seed_copies"] = not spec.pop("write_baseline_copies")
    spec["execution"] |= {"compile": False, "cache_folder": None}
    spec["recipe"] |= EARLIER_FIELDS | {"network": network}
    return json.dumps(spec)


def test_a_spec_of_an_earlier_release_is_read_and_what_is_gone_is_named(caplog: pytest.LogCaptureFixture) -> None:
    spec = parse_spec(earlier_spec("resnet18-imagenet"), "a plan")
    assert spec == make_spec(write_baseline_copies=True)
    assert ", ".join(sorted(EARLIER_FIELDS)) in caplog.text


def test_removed_network_is_named() -> None:
    with pytest.raises(ConfigError, match=r"a plan.*resnet18 with a 3x3 stem"):
        parse_spec(earlier_spec("resnet18"), "a plan")


@pytest.mark.parametrize("field", EARLIER_FIELDS)
def test_a_recipe_field_that_is_gone_is_refused_in_a_new_spec(field: str) -> None:
    spec = json.loads(make_spec().model_dump_json())
    spec["recipe"][field] = EARLIER_FIELDS[field]
    with pytest.raises(ConfigError, match=rf"recipe\.{field}"):
        parse_spec(json.dumps(spec), "here")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dataset_uri": "file:///store/processed-data/other/"}, "dataset_uri"),
        ({"dataset_digest": "latest"}, "dataset_digest"),
        ({"seed": -1}, "seed"),
        ({"sede": 1}, "sede"),
        ({"execution": {"device": "tpu"}}, r"execution\.device"),
        ({"mlflow": {"experiment": "x"}}, r"mlflow\.tracking_uri"),
        ({"recipe": {"name": "x"}}, r"recipe\.network"),
    ],
)
def test_a_wrong_spec_is_refused_by_field_and_source(change: dict, named: str) -> None:
    text = json.dumps(json.loads(make_spec().model_dump_json()) | change)
    with pytest.raises(ConfigError, match=f"my-file.*{named}"):
        parse_spec(text, "my-file")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', b"\xff\xfe"])
def test_invalid_spec_is_refused(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match="standard input"):
        parse_spec(text, "standard input")
