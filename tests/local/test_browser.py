"""The Dagster UI of the real `dagster dev` in a real browser."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from cifar_assets.demo import FOUR_ASSETS
from tests.fixtures.browser import NEEDS_CHROMIUM, open_browser
from tests.fixtures.cifar10 import PROCESSED_DATASET
from tests.fixtures.workspace import SMALL_TRAINING, Workspace, wait_until

PATIENCE_MS = 300_000

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800), NEEDS_CHROMIUM]


@pytest.fixture(scope="module")
def ui(workspace: Workspace) -> Iterator[str]:
    """Address of a running UI with one materialization of each of the four assets."""
    done = workspace.materialize(FOUR_ASSETS, {"trained_model": SMALL_TRAINING})
    assert done.returncode == 0, done.stdout
    with workspace.dagster_dev() as url:
        yield url


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with open_browser() as browser:
        made = browser.new_page(viewport={"width": 1500, "height": 1100})
        made.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        yield made


def test_the_model_page_shows_accuracy_and_pictures(ui: str, page: Page) -> None:
    page.goto(f"{ui}/assets/cifar10/trained_model")
    expect(page.get_by_text("test_accuracy", exact=True).first).to_be_visible()
    for title in ("loss and accuracy by epoch", "confusion matrix of the test split"):
        page.get_by_text("[Show Markdown]").nth(0 if "loss" in title else 1).click()
        picture = page.get_by_role("img", name=title)
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.naturalWidth") > 300
        page.keyboard.press("Escape")
        expect(picture).to_be_hidden()


def test_the_checks_page_says_why_the_model_passed(ui: str, page: Page) -> None:
    page.goto(f"{ui}/assets/cifar10/trained_model?view=checks")
    expect(page.get_by_text("accuracy_threshold").first).to_be_visible()
    expect(page.get_by_text(re.compile("reaches the threshold 0.5000")).first).to_be_visible()


def test_materialize_button_creates_a_run_and_a_new_result(ui: str, page: Page, workspace: Workspace) -> None:
    with workspace.instance() as instance:
        before = instance.get_latest_materialization_event(PROCESSED_DATASET)
        page.goto(f"{ui}/assets/cifar10/processed_dataset")
        page.get_by_role("button", name="Materialize").first.click()
        wait_until(
            lambda: instance.get_latest_materialization_event(PROCESSED_DATASET) != before, "a new materialization"
        )
        after = instance.get_latest_materialization_event(PROCESSED_DATASET)
    assert before is not None
    assert after is not None
    assert after.run_id != before.run_id
