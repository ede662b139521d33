"""Which images `make demo-loop` imports again; the commands themselves need minutes."""

import os

import pytest

from cifar_assets import demo

SIGNED = "https://example.org/images.parquet?signature=secret"
SHOWN = "https://example.org/images.parquet?signature=***"


@pytest.mark.parametrize(
    ("made", "setting", "source"),
    [("photos", "synthetic", "photos"), ("photos", "", "photos"), (SHOWN, SIGNED, SIGNED)],
)
def test_the_images_of_the_last_demo_are_used_again(
    made: str, setting: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_metadata", lambda _: {"source": made})
    monkeypatch.setenv("CIFAR10_SOURCE", setting)
    demo.reuse_source()
    assert os.environ["CIFAR10_SOURCE"] == source


@pytest.mark.parametrize(
    ("metadata", "text"),
    [({"source": SHOWN}, "complete address"), ({}, "an unknown source"), ({"source": "version aa"}, "version aa")],
)
def test_a_source_that_is_not_known_is_not_replaced(
    metadata: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_metadata", lambda _: metadata)
    monkeypatch.setenv("CIFAR10_SOURCE", "synthetic")
    with pytest.raises(SystemExit, match=text):
        demo.reuse_source()
