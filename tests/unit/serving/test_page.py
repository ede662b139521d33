"""The page for people: who gets it, what its policy allows, and the pixels in its answer."""

import base64
import hashlib
import io
import re
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from cifar_assets.contracts import CIFAR10, ImageSpec
from cifar_assets.dataset.formats.images import prepare_image
from cifar_assets.serving.answers import ServedModel
from cifar_assets.serving.page import PREDICT_PATH, page
from resources.object_store import FolderStore
from tests.unit.serving.server_process import PATIENT, ServerProcess, ask, form, run_server
from tests.unit.serving.tiny_model import store_tiny_model

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
MODEL = ServedModel("cifar10", "7", "a" * 64, "d" * 64, CIFAR10)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("page")
    with run_server(*store_tiny_model(FolderStore(folder / "models")), folder, *PATIENT) as server:
        yield server


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((60, 40)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def test_browsers_get_the_page_and_other_clients_the_liveness(server) -> None:
    answer = ask(server.port, "GET", "/", headers={"Accept": BROWSER})
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert answer.body.startswith(b"<!doctype html>")
    assert answer.headers["Vary"] == "Accept"
    head = ask(server.port, "HEAD", "/", headers={"Accept": BROWSER})
    assert (head.headers["Content-Length"], head.body) == (str(len(answer.body)), b"")
    for headers in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        answer = ask(server.port, "GET", "/", headers=headers)
        assert answer.json == {"status": "alive"}
        assert answer.headers["Vary"] == "Accept"
    assert ask(server.port, "GET", "/v2", headers={"Accept": BROWSER}).json["version"] == "1"
    assert ask(server.port, "GET", PREDICT_PATH).headers["Allow"] == "POST"


def test_the_page_may_be_turned_off(tmp_path) -> None:
    with run_server(*store_tiny_model(FolderStore(tmp_path / "models")), tmp_path, "--page", "false") as server:
        assert ask(server.port, "GET", "/", headers={"Accept": BROWSER}).json == {"status": "alive"}
        assert server.post(PREDICT_PATH, *form(("image", picture()))).status == 404


def test_the_policy_allows_only_the_page_s_own_script_and_style() -> None:
    response = page(MODEL)
    headers, text = dict(response.headers), response.body.decode()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    for kind in ("script", "style"):
        ((content,),) = (re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL),)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert not re.findall(r"<[^>]* (?:style|on\w+)=|(?:src|href)=\"(?:/|\w+:)(?!,)", text)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Opener-Policy"] == headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_the_page_describes_the_model_it_belongs_to() -> None:
    images = ImageSpec(classes=("<b>cat</b>", "caf\u00e9 & bar"), image_size=48)
    text = page(ServedModel("other", "v<1>", "a" * 64, "d" * 64, images)).body.decode()
    classes = "&lt;b&gt;cat&lt;/b&gt;, caf\u00e9 &amp; bar"
    for part in (classes, "48x48", "v&lt;1&gt;", "a" * 64, "d" * 64, "/other:predict"):
        assert part in text
    assert "{{" not in text
    assert "airplane" not in text


def test_the_answer_has_the_pixels_that_the_model_got(server) -> None:
    body = form(("image", picture()))
    answer = server.post(PREDICT_PATH, *body).json
    prefix, _, encoded = answer.pop("picture").partition(",")
    assert prefix == "data:image/png;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    np.testing.assert_array_equal(shown.transpose(2, 0, 1), prepare_image(picture(), 32))
    assert answer.pop("dataset_digest") == "d" * 64
    assert answer == server.post("/v1/models/cifar10:predict", *body).json


@pytest.mark.parametrize(
    ("parts", "status", "field"),
    [
        ([("image", b"text")], 400, "image[0]"),
        ([("image", picture()), ("image", picture())], 413, "image"),
        ([], 400, "image"),
    ],
)
def test_anything_but_one_picture_is_refused(server, parts, status, field) -> None:
    answer = server.post(PREDICT_PATH, *form(*parts))
    assert (answer.status, answer.json["field"]) == (status, field)
