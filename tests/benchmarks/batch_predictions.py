"""Images per second of a batch prediction beside the bare loop of `session.run` over decoded images, and its parts.

    python tests/benchmarks/batch_predictions.py [--recipe NAME | --model-uri URI --model-digest D] [--images N]

`loop` runs the model on decoded images in memory, in batches of 64 on all cores. `decode` reads and decodes files in
one thread. `predict` is the whole: listing, reading, digests, decoding, the model and Parquet files. `expected` is the
time of `loop` plus that of `decode` spread over all cores. Rounds alternate between them, so that all see the same
machine. The pictures are JPEG files of smooth noise.
"""

import argparse
import io
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifar_assets.cpus import available_cpus
from cifar_assets.dataset.formats.images import open_picture, picture_pixels
from cifar_assets.predictions.run import predict
from cifar_assets.serving.classifier import load_classifier
from resources.object_store import FolderStore, open_store
from tests.benchmarks.serving_latency import add_model_options, model_to_serve

BATCH = 64


def write_pictures(folder: Path, number: int, side: int) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = []
    for index in range(number):
        pixels = generator.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        paths.append(folder / f"{index:07d}.jpg")
        paths[-1].write_bytes(buffer.getvalue())
    return paths


def decoded(path: Path, size: int) -> NDArray[np.uint8]:
    return picture_pixels(open_picture(path.read_bytes()), size)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.set_defaults(recipe="fast")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--side", type=int, default=32, help="pixels of a picture's sides")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = FolderStore(Path(name))
        uri, digest = model_to_serve(options, root.at("models"))
        photos = root.root / "photos"
        photos.mkdir()
        paths = write_pictures(photos, options.images, options.side)
        model = load_classifier(uri, digest, num_threads=None, batch_images=BATCH)
        size = model.manifest.image_size
        images = np.stack([decoded(path, size) for path in paths])
        models = open_store(uri.rstrip("/").rpartition("/")[0])
        times: dict[str, list[float]] = {"loop": [], "decode": [], "predict": []}
        for number in range(options.rounds):
            batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
            times["loop"].append(seconds(lambda: [model.run(batch) for batch in batches]))  # noqa: B023
            times["decode"].append(seconds(lambda: [decoded(path, size) for path in paths]))
            target = root.at(f"round-{number}")
            found = predict(str(photos), models, target, digest, "float32")
            assert found.num_predicted == len(paths)
            times["predict"].append(found.seconds)
        medians = {name: float(np.median(values)) for name, values in times.items()}
        cpus = math.ceil(available_cpus())
        expected = medians["loop"] + medians["decode"] / cpus
        print(f"{cpus} cores, {len(paths)} JPEG files of {options.side}x{options.side}, {options.rounds} rounds")
        for name, value in {**medians, "expected": expected}.items():
            print(f"{name:>9} {len(paths) / value:9,.0f} images/s  {medians['loop'] / value:6.2f} of the loop")


if __name__ == "__main__":
    main()
