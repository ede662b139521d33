"""Whether the images that a model gets differ from those it was tested on. numpy only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cifar_assets.traffic.statistics import STATISTICS

CONFIDENCE = "confidence"
_WORDS = {
    "brightness": ("darker", "brighter"),
    "contrast": ("lower in contrast", "higher in contrast"),
    "saturation": ("less saturated", "more saturated"),
    "sharpness": ("blurrier", "sharper or noisier"),
    CONFIDENCE: ("classified with less confidence", "classified with more confidence"),
}
_TENTHS = np.linspace(0, 1, 11)[1:-1]


@dataclass(frozen=True)
class Sample:
    """Images by their probabilities (N, classes) and statistics (N, 4)."""

    probabilities: NDArray[np.floating]
    statistics: NDArray[np.floating]

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Column of the most probable class of each image."""
        return self.probabilities.argmax(axis=1)

    @property
    def properties(self) -> dict[str, NDArray[np.floating]]:
        """The statistics and the confidence, one value for each image."""
        return {**dict(zip(STATISTICS, self.statistics.T, strict=True)), CONFIDENCE: self.probabilities.max(axis=1)}

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> "Sample":
        return Sample(self.probabilities[rows], self.statistics[rows])

    def distinct(self) -> NDArray[np.int64]:
        """Rows of distinct images: a picture that was sent again and again counts once."""
        values = np.hstack([self.probabilities, self.statistics]).round(5)
        return np.sort(np.unique(values, axis=0, return_index=True)[1])


@dataclass(frozen=True)
class Comparison:
    """The two-sample test of one property."""

    name: str
    of_class: str | None
    """The predicted class of the compared images; None for all images."""
    p_value: float
    psi: float
    """Population stability index."""
    found: float
    """Mean of the tested sample."""
    expected: float
    """Mean of the reference."""

    def __str__(self) -> str:
        words = _WORDS.get(self.name)
        is_more = self.found > self.expected
        change = f"are {words[is_more]}" if words else f"are {('less', 'more')[is_more]} often seen as {self.name}"
        where = f" classified as {self.of_class}" if self.of_class else ""
        measured = self.name if words else f"mean probability of {self.name}"
        return (
            f"Pictures{where} {change} ({measured} {self.found:.3g}, expected {self.expected:.3g}; "
            f"PSI {self.psi:.2f}, p {self.p_value:.1g})."
        )


def compare_samples(
    reference: Sample, sample: Sample, classes: Sequence[str], *, min_class_images: int
) -> list[Comparison]:
    """Every property of all images, every class's probability, and every property by predicted class.

    A class is left out if either sample has fewer than `min_class_images` that were classified as it.
    """

    def properties(ours: Sample, theirs: Sample, of_class: str | None = None) -> Iterator[Comparison]:
        for name, values in ours.properties.items():
            expected = theirs.properties[name]
            yield _compare(name, of_class, values, expected, np.quantile(expected, _TENTHS))

    found = list(properties(sample, reference))
    for column, name in enumerate(classes):
        ours, theirs = sample.probabilities[:, column], reference.probabilities[:, column]
        found.append(_compare(name, None, ours, theirs, _TENTHS))
    for column, name in enumerate(classes):
        ours, theirs = (each.take(each.predicted == column) for each in (sample, reference))
        if min(len(ours), len(theirs)) >= min_class_images:
            found += properties(ours, theirs, name)
    return found


def find_drift(comparisons: Sequence[Comparison], *, alpha: float, min_psi: float) -> list[Comparison]:
    """Comparisons that are significant after Bonferroni's correction and large enough, the largest PSI first.

    A property that moved for all images is not repeated for single classes.
    """
    large = [each for each in comparisons if each.p_value * len(comparisons) <= alpha and each.psi >= min_psi]
    overall = {each.name for each in large if each.of_class is None}
    found = [each for each in large if each.of_class is None or each.name not in overall]
    return sorted(found, key=lambda each: (each.of_class is not None, each.name not in _WORDS, -each.psi))


def kolmogorov_smirnov(first: NDArray[np.floating], second: NDArray[np.floating]) -> tuple[float, float]:
    """The two-sample statistic and its asymptotic p-value (Press et al., Numerical Recipes, 3rd ed., 14.3.3)."""
    first, second = np.sort(first), np.sort(second)
    values = np.concatenate([first, second])
    below = (np.searchsorted(each, values, side="right") / len(each) for each in (first, second))
    statistic = float(np.abs(next(below) - next(below)).max())
    root = np.sqrt(len(first) * len(second) / (len(first) + len(second)))
    scaled = (root + 0.12 + 0.11 / root) * statistic
    if scaled < 0.3:  # the series converges slowly there, and its sum is above 0.99999
        return statistic, 1.0
    terms = np.arange(1, 101)
    p_value = 2 * np.sum((-1.0) ** (terms - 1) * np.exp(-2 * (terms * scaled) ** 2))
    return statistic, float(np.clip(p_value, 0, 1))


def population_stability(
    sample: NDArray[np.floating], reference: NDArray[np.floating], edges: NDArray[np.floating]
) -> float:
    """PSI over the bins between the edges (Siddiqi 2006); half an image is added to each bin, so that none is empty."""
    edges = np.unique(edges)
    counts = [np.bincount(np.searchsorted(edges, each), minlength=len(edges) + 1) + 0.5 for each in (sample, reference)]
    ours, theirs = (each / each.sum() for each in counts)
    return float(np.sum((ours - theirs) * np.log(ours / theirs)))


def _compare(
    name: str,
    of_class: str | None,
    sample: NDArray[np.floating],
    reference: NDArray[np.floating],
    edges: NDArray[np.floating],
) -> Comparison:
    _, p_value = kolmogorov_smirnov(sample, reference)
    psi = population_stability(sample, reference, edges)
    return Comparison(name, of_class, p_value, psi, float(sample.mean()), float(reference.mean()))
