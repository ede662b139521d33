"""The server's page for people in a real browser: mouse, keyboard, clipboard, phone, dark mode, and what goes wrong."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.images import prepare_image
from resources.inference_service.client import InferenceClient
from resources.object_store import FolderStore
from tests.fixtures.browser import NEEDS_CHROMIUM, open_browser
from tests.unit.serving.server_process import PATIENT, ServerProcess, run_server
from tests.unit.serving.tiny_model import store_tiny_model

PATIENCE_MS = 120_000
PREFIX = "/models/seven"
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""
TRANSFER = """([encoded, name]) => {
  const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name));
  return transfer;
}"""

pytestmark = [pytest.mark.browser, NEEDS_CHROMIUM]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    uri, digest = store_tiny_model(FolderStore(folder / "models"))
    with run_server(uri, digest, folder, "--model-version", "7", *PATIENT) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        expect.set_options(timeout=PATIENCE_MS)
        yield browser


def open_page(context: BrowserContext, server: ServerProcess) -> Page:
    context.set_default_timeout(PATIENCE_MS)
    context.add_init_script(WATCH)
    page = context.new_page()
    page.goto(server.url)
    return page


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    """The page in a fresh window. Whatever the test does, the policy has nothing to refuse and no script fails."""
    errors: list[str] = []
    with browser.new_context(permissions=["clipboard-read", "clipboard-write"]) as context:
        context.on("weberror", lambda error: errors.append(str(error.error)))
        page = open_page(context, server)
        yield page
        assert page.evaluate("violations") == []
    assert errors == []


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pixels = np.random.default_rng(5).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 60), Image.Resampling.NEAREST).save(path)
    return path


def status(page: Page) -> Locator:
    return page.get_by_role("status")


def check_answer(page: Page, server: ServerProcess, picture: Path) -> None:
    """The page shows what the API answers for the picture, and exactly the pixels that the model gets."""
    answer = InferenceClient(server.url, timeout=300).predict_files([picture])
    confidence = answer.probabilities[0].max()
    expect(status(page)).to_have_text(f"{answer.classes[0]}, {100 * confidence:.1f} %")
    order = np.argsort(-answer.probabilities[0], kind="stable")
    rows = [row.split() for row in page.get_by_role("row").all_inner_texts()[1:]]
    assert [row[0] for row in rows] == [CLASSES[label] for label in order]
    assert [float(row[1]) for row in rows] == pytest.approx(100 * answer.probabilities[0][order], abs=0.06)
    meters = page.locator("meter").evaluate_all("meters => meters.map((meter) => meter.value)")
    assert meters == pytest.approx(answer.probabilities[0][order], abs=1e-6)
    assert page.locator("meter").first.evaluate("meter => meter.clientWidth") > 60
    image = page.get_by_role("img", name="The picture as the model sees it")
    expect(image).to_be_visible()
    encoded = (image.get_attribute("src") or "").partition(",")[2]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    np.testing.assert_array_equal(pixels.transpose(2, 0, 1), prepare_image(picture.read_bytes(), 32))
    assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert image.evaluate("image => image.width") > 150


def drop(page: Page, data: bytes, name: str) -> None:
    transfer = page.evaluate_handle(TRANSFER, [base64.b64encode(data).decode(), name])
    for event in ("dragover", "drop"):
        page.dispatch_event("h1", event, {"dataTransfer": transfer})


def test_a_chosen_picture_is_answered(page, server, picture) -> None:
    expect(page.locator("#model_version")).to_have_text("7")
    expect(page.locator("#dataset_digest")).to_have_text("d" * 64)
    for _ in range(2):  # the same file may be chosen again
        with page.expect_response("**/page/predict") as asked:
            page.get_by_label("Choose, drop or paste").set_input_files(picture)
        assert asked.value.request.headers["cache-control"] == "no-store"
        check_answer(page, server, picture)


def test_a_picture_dropped_anywhere_is_answered(page, server, picture) -> None:
    drop(page, picture.read_bytes(), "picture.png")
    check_answer(page, server, picture)


def test_a_pasted_picture_is_answered(page, server, picture) -> None:
    page.evaluate(
        """async (encoded) => {
          const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
          await navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})]);
        }""",
        base64.b64encode(picture.read_bytes()).decode(),
    )
    page.keyboard.press("Control+V")
    check_answer(page, server, picture)


def test_the_keyboard_is_enough(page, server, picture) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_label("Choose, drop or paste")).to_be_focused()
    page.locator(":focus").set_input_files(picture)  # opening a file dialog is the browser's part
    check_answer(page, server, picture)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link")).to_be_focused()


def test_a_screen_reader_finds_names_and_roles(page, picture) -> None:
    page.get_by_label("Choose, drop or paste").set_input_files(picture)
    expect(page.get_by_role("table")).to_be_visible()
    tree = page.locator("main").aria_snapshot()
    for part in (
        '- heading "cifar10" [level=1]',
        '- button "Choose, drop or paste a PNG or JPEG picture."',
        "- status:",
        '- region "Answer":',
        '- img "The picture as the model sees it"',
        '- columnheader "Probability"',
        '- rowheader "airplane"',
        '- link "Description as OpenAPI"',
    ):
        assert part in tree, tree


def test_faults_are_shown_as_text_and_the_next_picture_is_answered(page, server, picture) -> None:
    faults = {
        b"just some text": "expected a PNG or JPEG image, got a file of an unknown kind",
        picture.read_bytes()[:-40]: "expected a complete PNG or JPEG image",
        b"": "an empty file",
        bytes(11 << 20): "expected an image file of at most 10485760 bytes",
    }
    for data, words in faults.items():
        drop(page, data, "<b>picture</b>.png")
        expect(status(page)).to_contain_text(words)
        expect(page.get_by_role("table")).to_be_hidden()
    page.route("**/page/predict", lambda route: route.abort())
    drop(page, picture.read_bytes(), "picture.png")
    expect(status(page)).to_contain_text("The server did not answer")
    page.unroute("**/page/predict")
    page.route("**/page/predict", lambda route: route.fulfill(status=502, body="<h1>Bad Gateway</h1>"))
    drop(page, picture.read_bytes(), "picture.png")
    expect(status(page)).to_have_text("502 Bad Gateway")
    page.unroute("**/page/predict")
    drop(page, picture.read_bytes(), "picture.png")
    check_answer(page, server, picture)


def test_it_works_under_a_path_prefix(browser, server, picture) -> None:
    """As behind an ingress that removes the prefix, with and without the final slash."""
    for prefix in (PREFIX, f"{PREFIX}/"):
        with browser.new_context() as context:
            context.set_default_timeout(PATIENCE_MS)
            context.route(f"**{PREFIX}**", lambda route: route.continue_(url=route.request.url.replace(PREFIX, "")))
            page = context.new_page()
            page.goto(f"{server.url}{prefix}")
            page.get_by_label("Choose, drop or paste").set_input_files(picture)
            check_answer(page, server, picture)
            assert page.get_by_role("link").evaluate("link => link.href") == f"{server.url}{PREFIX}/openapi.json"
            expect(page.locator("#example")).to_contain_text(f"{server.url}{PREFIX}/v1/models/cifar10:predict")


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_it_fits_a_phone_in_light_and_dark(browser, server, picture, scheme, is_dark) -> None:
    phone = {"viewport": {"width": 320, "height": 640}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
    with browser.new_context(**phone, color_scheme=scheme) as context:
        page = open_page(context, server)
        page.get_by_label("Choose, drop or paste").set_input_files(picture)
        check_answer(page, server, picture)
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        color = page.evaluate("getComputedStyle(document.body).color")
        assert (sum(map(int, re.findall(r"\d+", color)[:3])) > 380) == is_dark
        assert page.evaluate("violations") == []


def test_the_policy_refuses_what_is_not_the_page_s(browser, server) -> None:
    """Shows that the other tests would notice a violation."""
    with browser.new_context() as context:
        page = open_page(context, server)
        page.evaluate("document.body.setAttribute('style', 'color: red')")
        page.wait_for_function("violations.includes('style-src-attr')")
