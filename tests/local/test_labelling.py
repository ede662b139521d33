"""From recorded pictures to training data: a batch is labeled in a real browser and by a program, and lands."""

import io
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.versions.raw import build_raw_version
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.labelling.batches import Desk
from cifar_assets.labelling.server import LabellingServer
from resources.inference_service import DeployRequest, LocalInferenceService
from resources.inference_service.client import InferenceClient
from resources.object_store import FolderStore
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.browser import NEEDS_CHROMIUM, open_browser
from tests.fixtures.cifar10 import pictures_to_label_asset as pictures_to_label
from tests.fixtures.cifar10 import served_traffic_asset as served_traffic
from tests.fixtures.cifar10 import served_traffic_checks
from tests.fixtures.ports import free_port
from tests.fixtures.tiny_data import store_tiny_data, write_drawn_images
from tests.fixtures.workspace import wait_until
from tests.local.test_monitoring import recorded
from tests.local.test_page import PATIENCE_MS, WATCH
from tests.unit.serving.server_process import ask
from tests.unit.serving.tiny_model import store_tiny_model

pytestmark = [pytest.mark.browser, NEEDS_CHROMIUM]
NUM_TEST = 600


@dataclass(frozen=True)
class World:
    """A store with recorded traffic of darkened pictures, and a batch of twenty of them."""

    store: LocalObjectStore
    told: int
    """Pictures that landed because a program told their class."""
    num_drifted: int

    @property
    def raw(self) -> FolderStore:
        return FolderStore(self.store.root().root / "raw-data")


def record_and_choose(folder: Path) -> World:
    store = LocalObjectStore(path=str(folder / "store"))
    data = store_tiny_data(store.root(), test=NUM_TEST)
    uri, digest = store_tiny_model(store.models, dataset=data.processed)
    port = free_port()
    serving = LocalInferenceService(
        server_module="cifar_assets.serving",
        state_dir=str(folder / "serving"),
        port=port,
        startup_timeout_seconds=400,
        options={"record_uri": store.traffic.uri(), "record_fraction": "1", "record_interval": "0.1", "feedback": "1"},
    )
    images = open_split(store.processed, data.processed, "test").take(np.arange(0, NUM_TEST, 2)) // 2
    traffic = folder / "store" / "served-traffic"
    try:
        client = InferenceClient(serving.deploy(DeployRequest(uri, digest, "1")).url, timeout=300, is_traffic=True)
        client.predict_arrays(images)
        wait_until(lambda: sum(map(len, recorded(traffic))) == len(images), "the records")
        (found,) = recorded(traffic)
        for place, label in zip(found.places[:2], ("deer", "ship"), strict=True):
            body = json.dumps({"request_id": place[0], "index": place[1], "label": label}).encode()
            assert ask(port, "POST", "/v1/feedback", body).status == 202
        assert ask(port, "GET", "/v1/feedback").status == 405
        wait_until(lambda: sum(len(each.info.feedback) for each in recorded(traffic)) == 2, "the feedback")
        with dg.DagsterInstance.ephemeral() as instance:
            resources = {"object_store": store, "serving": serving}
            config = {"ops": {pictures_to_label.node_def.name: {"config": {"num_pictures": 20}}}}
            done = dg.materialize(
                [served_traffic, served_traffic_checks, pictures_to_label],
                resources=resources,
                instance=instance,
                run_config=config,
            )
        (made,) = done.asset_materializations_for_node(pictures_to_label.node_def.name)
    finally:
        serving.delete()
    assert made.metadata["num_pictures"].value == 20
    numbers = [made.metadata[name].value for name in ("num_landed_from_feedback", "num_drifted")]
    return World(store, *(int(str(number)) for number in numbers))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_SERVING_LINGER", "0.2")
        return record_and_choose(tmp_path_factory.mktemp("labelling"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        expect.set_options(timeout=PATIENCE_MS)
        yield browser


@pytest.fixture
def address(world: World) -> Iterator[str]:
    world.raw.delete(f"to-label/{Desk(world.raw, None, 'ada').name}/labels.json")
    with LabellingServer(Desk(world.raw, None, "ada"), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://{server.host}"
        server.shutdown()
        thread.join()


def open_page(context: BrowserContext, address: str) -> Page:
    context.set_default_timeout(PATIENCE_MS)
    context.add_init_script(WATCH)
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#progress")).to_have_text("0 labeled, 20 to go")
    return page


def press(page: Page, key: str, progress: str) -> None:
    """Press a key, and wait until the page has taken it and can take the next."""
    page.keyboard.press(key)
    expect(page.locator("#progress")).to_have_text(progress)
    expect(page.get_by_role("main")).to_have_attribute("aria-busy", "false")


def test_a_batch_is_labeled_by_keyboard_and_joins_the_dataset(
    world: World, browser: Browser, address: str, tmp_path: Path
) -> None:
    assert (world.told, world.num_drifted) == (2, 10)
    errors: list[str] = []
    with browser.new_context() as context:
        context.on("weberror", lambda error: errors.append(str(error.error)))
        page = open_page(context, address)
        expect(page.get_by_role("main")).to_have_attribute("aria-busy", "false")
        assert page.get_by_role("img").evaluate("image => image.naturalWidth") == 32
        expect(page.locator("#guess")).to_contain_text("drifted; the model's guess: ")
        press(page, "4", "1 labeled, 19 to go")
        expect(page.get_by_role("status")).to_have_text("Labeled as cat")
        press(page, "0", "2 labeled, 18 to go")
        press(page, "u", "1 labeled, 19 to go")
        press(page, "1", "2 labeled, 18 to go")
        press(page, "s", "2 labeled, 17 to go")
        page.reload()  # what was labeled is stored; what was skipped is shown again
        expect(page.locator("#progress")).to_have_text("2 labeled, 18 to go")
        expect(page.get_by_role("main")).to_have_attribute("aria-busy", "false")
        press(page, "u", "1 labeled, 19 to go")
        for number in range(19):
            press(page, "2", f"{number + 2} labeled, {18 - number} to go")
        expect(page.get_by_role("img")).to_be_hidden()
        press(page, "Enter", "20 labeled, 0 to go")
        expect(page.get_by_role("status")).to_contain_text("Saved 20 labels as landing/labeled/")
        assert page.evaluate("violations") == []
    assert errors == []
    (by_person,) = world.raw.list("landing/labeled/")
    rows = pq.read_table(io.BytesIO(world.raw.read(by_person.key))).to_pylist()
    assert sorted(CLASSES[row["label"]] for row in rows) == ["automobile"] * 19 + ["cat"]
    by_program = list(world.raw.list("landing/feedback/"))
    assert len(by_program) == 2
    for info in (by_person, *by_program):
        os.utime(str(world.raw.local_path(info.key)), (0, 0))  # a file is read once it has not changed for a minute
    write_drawn_images(tmp_path, 240, NUM_TEST)
    before = len(list(world.raw.list("rejected/")))
    version = build_raw_version(world.raw, str(tmp_path))
    assert version.manifest.landed_rows == 22
    assert len(list(world.raw.list("rejected/"))) == before


def test_it_works_on_a_phone_and_says_what_failed(world: World, browser: Browser, address: str) -> None:
    phone = {"viewport": {"width": 320, "height": 640}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
    with browser.new_context(**phone) as context:
        page = open_page(context, address)
        expect(page.get_by_role("button", name="Save")).to_be_disabled()
        page.get_by_role("button", name="7 frog").tap()
        expect(page.get_by_role("status")).to_have_text("Labeled as frog")
        expect(page.get_by_role("main")).to_have_attribute("aria-busy", "false")
        page.get_by_role("button", name="Undo").tap()
        expect(page.get_by_role("status")).to_have_text("Undone")
        expect(page.get_by_role("main")).to_have_attribute("aria-busy", "false")
        page.route("**/label", lambda route: route.abort())
        page.get_by_role("button", name="7 frog").tap()
        expect(page.get_by_role("status")).to_contain_text("Not done")
        expect(page.locator("#progress")).to_have_text("0 labeled, 20 to go")
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        assert page.evaluate("violations") == []
