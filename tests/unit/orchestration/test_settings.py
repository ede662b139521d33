"""The environment of the code location: the table in the docs, and errors for invalid values."""

import os
import re
from pathlib import Path

import pytest
from Crypto.PublicKey import ECC

from cifar_assets.deployment import resources_for, serving_for
from cifar_assets.settings import Settings, read_settings
from resources.errors import ConfigError
from resources.mlflow.target import CA_VARIABLE
from resources.object_store import s3_settings
from resources.trainer.contract import JOB_SPEC_VARIABLE
from tests.fixtures.settings import settings_of
from tests.fixtures.workspace import ROOT

TABLE = dict(
    re.findall(r"^\| (`[A-Z].*?`) \| (.*) \|$", (ROOT / "docs" / "settings.md").read_text(), flags=re.MULTILINE)
)


def test_the_table_is_made_of_the_fields() -> None:
    for name, field in Settings.model_fields.items():
        default = field.get_default()
        shown = f"`{default}`" if default not in (None, {}) else ""
        assert TABLE[f"`{name.upper()}`"] == f"{shown} | {field.description}"


def test_variables_of_other_processes_are_in_the_table() -> None:
    of_the_store = [name for names in s3_settings.VARIABLES.values() for name in names]
    others = (*of_the_store, *s3_settings.CA_VARIABLES, CA_VARIABLE, JOB_SPEC_VARIABLE)
    assert not {f"`{name}`" for name in others} - set(re.findall(r"`\w+`", " ".join(TABLE)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ACCURACY_THRESHOLD", text) for text in ("80", "-0.1", "0,8", "nan", "inf", "high")),
        *(("INFERENCE_SERVICE_PORT", text) for text in ("0", "65536", "http")),
        ("DAGSTER_DEPLOYMENT", "cloud"),
        ("SERVING_PRECISION", "int4"),
        *(
            (name, text)
            for name in ("RETRAIN_CONFIG", "TRAINER_JOB", "SERVER_SETTINGS")
            for text in ("[1]", "{cpu", "1")
        ),
        *(("ARGO_PARAMETERS", text) for text in ("[]", "{", '"x"')),
    ],
)
def test_wrong_value_is_an_error_that_names_the_variable_and_what_is_allowed(name: str, value: str) -> None:
    allowed = (Settings.model_fields[name.lower()].description or "").rstrip(".")
    with pytest.raises(ConfigError, match=rf"{name}: .*{re.escape(allowed)}"):
        settings_of({name: value})


def test_public_key_reaches_the_gate_as_text(tmp_path: Path) -> None:
    pair = ECC.generate(curve="P-256")
    file = tmp_path / "public.pem"
    file.write_text(str(pair.public_key().export_key(format="PEM")))
    for value in (str(file), file.read_text()):
        assert resources_for(settings_of({"MODEL_PUBLIC_KEY": value}))["gate"].public_keys == f"{file.read_text()}\n"
    for value in (str(tmp_path / "missing.pem"), str(pair.export_key(format="PEM"))):
        with pytest.raises(ConfigError, match="MODEL_PUBLIC_KEY"):
            settings_of({"MODEL_PUBLIC_KEY": value})


@pytest.mark.parametrize("name", ["TRAINER_IMAGE", "SERVER_IMAGE"])
def test_a_cluster_needs_both_images(name: str) -> None:
    images = {"TRAINER_IMAGE": "trainer:1", "SERVER_IMAGE": "server:1"} | {name: ""}
    with pytest.raises(ConfigError, match=f"{name} is not set"):
        settings_of({"DAGSTER_DEPLOYMENT": "kubernetes", **images})
    assert settings_of(images).dagster_deployment == "local"


def test_empty_variable_counts_as_unset() -> None:
    assert settings_of(dict.fromkeys((name.upper() for name in Settings.model_fields), "")) == settings_of({})


def test_the_environment_is_read_and_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRAIN_CONFIG", '{"recipe": "fast"}')
    before = dict(os.environ)
    assert read_settings().retrain_config == {"recipe": "fast"}
    assert os.environ == before


def test_port_and_threshold_reach_the_resources() -> None:
    resources = resources_for(settings_of({"ACCURACY_THRESHOLD": "0.5", "INFERENCE_SERVICE_PORT": "9000"}))
    assert resources["gate"].threshold == 0.5
    assert resources["serving"].port == 9000


def test_recording_reaches_the_server_of_either_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_BUCKET_PREFIX", "team-")
    on = {"RECORDED_FRACTION": "0.25", "TRAINER_IMAGE": "trainer:1", "SERVER_IMAGE": "server:1"}
    assert resources_for(settings_of({}))["serving"].options == {}
    local = resources_for(settings_of(on))["serving"].options
    assert local["record_uri"].endswith("/.cifar/store/served-traffic/")
    assert local["record_fraction"] == "0.25"
    own = {"SERVER_SETTINGS": '{"env": {"CIFAR_SERVING_RECORD_PIXELS": "false"}}'}
    cluster = serving_for(settings_of({**on, **own, "DAGSTER_DEPLOYMENT": "kubernetes"}))
    assert cluster.settings.env == {
        "CIFAR_SERVING_RECORD_URI": "s3://team-served-traffic/",
        "CIFAR_SERVING_RECORD_FRACTION": "0.25",
        "CIFAR_SERVING_RECORD_PIXELS": "false",
    }
    assert serving_for(settings_of({**on, "RECORDED_FRACTION": ""})).settings.env == {}
