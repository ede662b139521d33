"""How often the check `drift` raises a false alarm, and how often it finds a change, on a stored model's test images.

    python tests/benchmarks/drift_power.py --store .cifar/store --model-digest D

The reference is the check's own: 2,000 test images. Samples are drawn from the others, without replacement: unchanged
ones for the false alarms, then with a change of all images or of some of them. Needs a model of real images.
"""

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from cifar_assets.checks.drift import DriftConfig
from cifar_assets.dataset.stores import open_stores
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.model_package import read_manifest
from cifar_assets.serving.classifier import load_classifier, softmax
from cifar_assets.traffic.drift import Sample, compare_samples, find_drift
from cifar_assets.traffic.statistics import image_statistics

CONFIG = DriftConfig()
SIZES = (200, 500, 1000)
Images = NDArray[np.uint8]
NOISE = np.random.default_rng(1)


def each_picture(change: Callable[[Image.Image], Image.Image]) -> Callable[[Images], Images]:
    def changed(images: Images) -> Images:
        pictures = (Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in images)
        return np.stack([np.asarray(change(picture)).transpose(2, 0, 1) for picture in pictures])

    return changed


def noisy(images: Images) -> Images:
    return np.clip(images + NOISE.normal(0, 15, images.shape), 0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[Images], Images]] = {
    "darker (x 0.8)": each_picture(lambda picture: ImageEnhance.Brightness(picture).enhance(0.8)),
    "darker (x 0.5)": each_picture(lambda picture: ImageEnhance.Brightness(picture).enhance(0.5)),
    "blurred (sigma 1)": each_picture(lambda picture: picture.filter(ImageFilter.GaussianBlur(1))),
    "grey": each_picture(lambda picture: picture.convert("L").convert("RGB")),
    "noise (sigma 15)": noisy,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default=".cifar/store")
    parser.add_argument("--model-digest", required=True)
    parser.add_argument("--pool", type=int, default=1000, help="images that each change is applied to")
    parser.add_argument("--resamples", type=int, default=200)
    options = parser.parse_args()
    stores = open_stores(options.store)
    package = stores.models.at(options.model_digest)
    manifest = read_manifest(package, options.model_digest)
    classifier = load_classifier(package.uri(), options.model_digest, num_threads=None, batch_images=64)
    test = open_split(stores.processed, manifest.dataset_digest, "test")
    random = np.random.default_rng(0)

    def sample_of(images: Images) -> Sample:
        logits = [classifier.run(images[start : start + 64]) for start in range(0, len(images), 64)]
        return Sample(softmax(np.concatenate(logits)), image_statistics(images))

    chosen = np.unique(np.linspace(0, len(test) - 1, CONFIG.num_reference_images).astype(np.int64))
    others = np.setdiff1d(np.arange(len(test)), chosen)
    reference, usual = sample_of(test.take(chosen)), sample_of(test.take(others))
    pool = random.permutation(len(others))[: options.pool]

    def drifts(sample: Sample) -> list[str]:
        compared = compare_samples(reference, sample, manifest.classes, min_class_images=CONFIG.min_class_images)
        found = find_drift(compared, alpha=CONFIG.alpha, min_psi=CONFIG.min_psi)
        return [f"{each.name} {each.of_class or ''}".strip() for each in found]

    def rate(label: str, draw: Callable[[int], Sample], repeats: int) -> None:
        for size in SIZES:
            results = [drifts(draw(size)) for _ in range(repeats)]
            first = [names[0] for names in results if names]
            most = max(set(first), key=first.count) if first else "-"
            print(f"{label:<34} n={size:<5} {len(first):>4} of {repeats:<4} named first: {most}", flush=True)

    print(f"reference {len(reference)} images, {len(usual)} others, alpha {CONFIG.alpha}, PSI {CONFIG.min_psi}")
    rate("unchanged", lambda size: usual.take(random.choice(len(usual), size, replace=False)), options.resamples)
    labels = test.labels[others]
    for name, fraction in (("class mix: 2 x cat", 0.2), ("class mix: half cat", 0.5)):
        cats = labels == manifest.classes.index("cat")

        def mixed(size: int, fraction: float = fraction, cats: NDArray[np.bool_] = cats) -> Sample:
            num_cats = min(int(size * fraction), cats.sum())
            parts = [random.choice(np.flatnonzero(cats), num_cats, replace=False)]
            parts.append(random.choice(np.flatnonzero(~cats), size - num_cats, replace=False))
            return usual.take(np.concatenate(parts))

        rate(name, mixed, 20)
    for name, change in CHANGES.items():
        changed = sample_of(change(test.take(others[pool])))
        for fraction in (1.0, 0.3):

            def some(size: int, fraction: float = fraction, changed: Sample = changed) -> Sample:
                rows = random.choice(len(pool), size, replace=False)
                new, old = changed.take(rows[: int(size * fraction)]), usual.take(pool[rows[int(size * fraction) :]])
                joined = zip((new.probabilities, new.statistics), (old.probabilities, old.statistics), strict=True)
                return Sample(*map(np.concatenate, joined))

            rate(f"{name}, {fraction:.0%} of the images", some, 20)


if __name__ == "__main__":
    main()
