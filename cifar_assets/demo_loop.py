"""`make demo-loop`: darkened pictures are noticed, labeled, trained on, and a new version of the model answers."""

import json
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import urllib3

from cifar_assets import demo
from cifar_assets.assets import keys
from cifar_assets.assets.record import evaluations
from cifar_assets.dataset.formats.images import pixel_digest
from cifar_assets.dataset.landing.zone import SETTLED_SECONDS
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.labelling.batches import Desk
from cifar_assets.labelling.server import LabellingServer
from cifar_assets.traffic.records import read_traffic
from resources.errors import StoreError
from resources.inference_service.client import InferenceClient
from resources.mlflow.target import DEFAULT_NAME
from resources.object_store import ObjectStore
from resources.object_store.resource import LocalObjectStore

SERVED_TRAFFIC = dg.AssetKey([DEFAULT_NAME, keys.SERVED_TRAFFIC])
_NUM_SENT, _NUM_LABELED = 300, 20
_RECORD_SECONDS = 300


def main() -> int:
    """Tell the story with the running service. If one of its runs fails, its exit code is returned."""
    demo.reuse_source()
    demo.prepare()
    store, served = LocalObjectStore(), demo.served()
    split = open_split(store.processed, str(served["dataset_digest"]), "test")
    if len(split.labels) < _NUM_SENT:
        raise SystemExit(
            f"There are {len(split.labels)} test images, and this sends {_NUM_SENT}: run `make demo` with more first."
        )
    images = split.take(np.arange(_NUM_SENT)) // 2
    labels = split.labels[:_NUM_SENT]
    truth = {
        f"{pixel_digest(image)}.png": split.manifest.classes[label] for image, label in zip(images, labels, strict=True)
    }
    client = InferenceClient(str(served["url"]), is_traffic=True)
    demo.log.info("Sending %d test pictures at half brightness to version %s.", _NUM_SENT, served["model_version"])
    num_recorded = _num_recorded(store.traffic)
    before = client.predict_arrays(images).labels
    _wait_until_recorded(store.traffic, num_recorded + _NUM_SENT)
    if code := demo.launch("--assets", f'key:"{SERVED_TRAFFIC.to_user_string()}"+'):  # with pictures_to_label
        return code
    with dg.DagsterInstance.from_config(str(Path.cwd())) as instance:
        evaluation, _ = next(evaluations(instance, dg.AssetCheckKey(SERVED_TRAFFIC, "drift")))
    demo.log.info("\nThe check drift says: %s\n", evaluation.description)
    demo.log.info("Labeled %(saved)s pictures: raw-data/%(key)s", label_newest(store.raw, truth, _NUM_LABELED))
    demo.log.info("Waiting %.0f s, after which a landed file counts as complete.", SETTLED_SECONDS)
    time.sleep(SETTLED_SECONDS + 1)
    if code := demo.launch("--job", "retrain", trains=True):
        return code
    after = client.predict_arrays(images).labels
    demo.log.info(
        "\nVersion %s answered %d of the %d darkened pictures right. Version %s, which was also trained on what was "
        "labeled, answers %d right.",
        served["model_version"],
        np.count_nonzero(before == labels),
        _NUM_SENT,
        demo.served()["model_version"],
        np.count_nonzero(after == labels),
    )
    return 0


def _num_recorded(traffic: ObjectStore) -> int:
    now = datetime.now(UTC)
    return sum(map(len, read_traffic(traffic, now - timedelta(hours=1), now + timedelta(hours=1))))


def _wait_until_recorded(traffic: ObjectStore, num_images: int) -> None:
    end = time.monotonic() + _RECORD_SECONDS
    while _num_recorded(traffic) < num_images:
        if time.monotonic() > end:
            raise StoreError("The service records too few pictures: run `make demo` with RECORDED_FRACTION=1 first.")
        time.sleep(1)


def label_newest(raw: ObjectStore, truth: Mapping[str, str], num_pictures: int) -> dict[str, Any]:
    """Send what the page would send for the first pictures of the newest batch. `truth` has classes by file."""
    with LabellingServer(Desk(raw, None, "demo"), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        origin = f"http://{server.host}"

        def ask(method: str, path: str, **body: str) -> dict:
            answer = urllib3.request(method, origin + path, body=json.dumps(body), headers={"Origin": origin})
            if answer.status != 200:
                raise StoreError(f"{path}: {answer.status} {answer.data[:500]}")
            return answer.json()

        files = [picture["file"] for picture in ask("GET", "/batch")["pictures"] if picture["file"] in truth]
        for file in files[:num_pictures]:
            ask("POST", "/label", file=file, label=truth[file])
        saved = ask("POST", "/save")
        server.shutdown()
        thread.join()
    return saved


if __name__ == "__main__":
    sys.exit(main())
