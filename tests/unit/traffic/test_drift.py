"""The tests behind the check `drift`: right numbers, no false alarms, and the right words."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cifar_assets.traffic.drift import (
    Comparison,
    Sample,
    compare_samples,
    find_drift,
    kolmogorov_smirnov,
    population_stability,
)

CLASSES = ("cat", "dog", "ship")
MIN_CLASS_IMAGES = 50


def sample(random: np.random.Generator, size: int, weights: tuple[float, ...] = (1, 1, 1)) -> Sample:
    """Images of a model that is fairly certain, with independent statistics."""
    labels = random.choice(3, size, p=np.asarray(weights) / sum(weights))
    logits = random.normal(size=(size, 3)) + 4 * np.eye(3)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Sample(probabilities, random.normal(0.5, 0.1, size=(size, 4)))


def drift(reference: Sample, own: Sample) -> list[Comparison]:
    compared = compare_samples(reference, own, CLASSES, min_class_images=MIN_CLASS_IMAGES)
    return find_drift(compared, alpha=0.01, min_psi=0.1)


def moved(own: Sample, column: int, rows: NDArray[np.bool_] | slice, by: float) -> Sample:
    statistics = own.statistics.copy()
    statistics[rows, column] += by
    return Sample(own.probabilities, statistics)


@pytest.mark.parametrize("sizes", [(50, 200), (300, 300), (2000, 500)])
@pytest.mark.parametrize("shift", [0, 0.1, 0.3])
def test_statistic_and_p_value_are_those_of_scipy(sizes: tuple[int, int], shift: float) -> None:
    random = np.random.default_rng(1)
    first, second = random.normal(size=sizes[0]), random.normal(shift, size=sizes[1]).round(1)
    expected = stats.ks_2samp(first, second, method="exact")
    statistic, p_value = kolmogorov_smirnov(first, second)
    assert statistic == pytest.approx(expected.statistic)  # pyright: ignore[reportAttributeAccessIssue]
    assert p_value == pytest.approx(expected.pvalue, rel=0.25, abs=1e-8)  # pyright: ignore[reportAttributeAccessIssue]


def test_equal_samples_have_no_distance() -> None:
    values = np.linspace(0, 1, 300)
    assert kolmogorov_smirnov(values, values) == (0, 1)
    assert population_stability(values, values, np.array([0.2, 0.2, 0.5])) == 0


def test_psi_is_the_textbooks() -> None:
    ours, theirs = np.repeat([0.0, 1.0], [800, 200]), np.repeat([0.0, 1.0], [500, 500])
    expected = (0.8 - 0.5) * np.log(0.8 / 0.5) + (0.2 - 0.5) * np.log(0.2 / 0.5)
    assert population_stability(ours, theirs, np.array([0.5])) == pytest.approx(expected, rel=0.01)


def test_samples_of_one_distribution_raise_no_alarm() -> None:
    random = np.random.default_rng(2)
    alarms = [drift(sample(random, 1000), sample(random, size)) for size in (200, 500) for _ in range(25)]
    assert sum(map(bool, alarms)) <= 1


@pytest.mark.parametrize(
    ("column", "by", "words"),
    [
        (0, -0.1, "are darker (brightness 0.4"),
        (0, 0.1, "are brighter"),
        (1, -0.1, "are lower in contrast"),
        (2, -0.1, "are less saturated"),
        (3, -0.1, "are blurrier"),
        (3, 0.1, "are sharper or noisier"),
    ],
)
def test_moved_property_is_named_in_words_and_only_it(column: int, by: float, words: str) -> None:
    random = np.random.default_rng(3)
    reference, own = sample(random, 1000), moved(sample(random, 300), column, slice(None), by)
    (finding,) = drift(reference, own)
    assert words in str(finding)
    assert finding.of_class is None


def test_property_of_one_class_is_found_and_named() -> None:
    random = np.random.default_rng(4)
    reference, own = (sample(random, size, (1, 4, 4)) for size in (3000, 900))
    (finding,) = drift(reference, moved(own, 0, own.predicted == 0, -0.2))
    assert str(finding).startswith("Pictures classified as cat are darker")


def test_a_class_with_too_few_images_is_not_tested() -> None:
    random = np.random.default_rng(5)
    compared = compare_samples(
        sample(random, 1000), sample(random, 200, (1, 10, 10)), CLASSES, min_class_images=MIN_CLASS_IMAGES
    )
    assert {each.of_class for each in compared} == {None, "dog", "ship"}


def test_another_mix_of_classes_names_the_class() -> None:
    random = np.random.default_rng(6)
    found = drift(sample(random, 2000), sample(random, 300, (4, 1, 1)))
    assert {each.name for each in found} == {*CLASSES}
    assert any("are more often seen as cat (mean probability of cat 0.6" in str(each) for each in found)


def test_small_shift_is_no_drift_however_many_images_prove_it() -> None:
    random = np.random.default_rng(7)
    reference, own = sample(random, 50_000), moved(sample(random, 50_000), 0, slice(None), 0.02)
    compared = compare_samples(reference, own, CLASSES, min_class_images=10**6)
    assert next(each for each in compared if each.name == "brightness").p_value < 1e-10
    assert find_drift(compared, alpha=0.01, min_psi=0.1) == []


def test_an_image_that_is_sent_again_counts_once() -> None:
    own = sample(np.random.default_rng(8), 10)
    rows = np.array([0, 1, 1, 1, 2, 0])
    assert own.take(rows).distinct().tolist() == [0, 1, 4]
