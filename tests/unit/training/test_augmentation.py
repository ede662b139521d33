import numpy as np
import pytest
import torch
from torch import Tensor

from cifar_assets.training.data import EpochAugmentation
from cifar_assets.training.recipes import Recipe, get_recipe

NUM_IMAGES = 24
INDICES = np.arange(NUM_IMAGES)


@pytest.fixture
def images() -> Tensor:
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (NUM_IMAGES, 3, 32, 32)).astype(np.uint8))


def recipe_with(**changes: object) -> Recipe:
    return get_recipe("resnet18", {"flip": "none", "translate": 0, "cutout": 0, **changes})


def test_no_augmentation_changes_nothing(images: Tensor) -> None:
    augmentation = EpochAugmentation(recipe_with(), 0, 0, NUM_IMAGES, 32)
    assert torch.equal(augmentation.shift_and_flip(images, INDICES), images)
    assert torch.equal(augmentation.cut_out(images.float(), INDICES), images.float())


def test_augmentation_of_an_image_does_not_depend_on_its_batch(images: Tensor) -> None:
    """Two processes that share a batch produce the same images as one process."""
    recipe = recipe_with(flip="random", translate=4, cutout=8)

    def augmented(indices: np.ndarray) -> Tensor:
        augmentation = EpochAugmentation(recipe, 3, 5, NUM_IMAGES, 32)
        shifted = augmentation.shift_and_flip(images[torch.from_numpy(indices)], indices)
        return augmentation.cut_out(shifted.float(), indices)

    whole = augmented(INDICES)
    assert torch.equal(whole[0::2], augmented(INDICES[0::2]))
    assert torch.equal(whole[1::2], augmented(INDICES[1::2]))


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_epochs_differ_and_repeat(images: Tensor, flip: str) -> None:
    recipe = recipe_with(flip=flip, translate=2)

    def epoch(number: int) -> Tensor:
        return EpochAugmentation(recipe, 1, number, NUM_IMAGES, 32).shift_and_flip(images, INDICES)

    assert torch.equal(epoch(4), epoch(4))
    assert not torch.equal(epoch(4), epoch(5))


@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_a_shift_is_a_crop_of_the_padded_image(images: Tensor, padding: str) -> None:
    result = EpochAugmentation(recipe_with(translate=3, padding=padding), 0, 0, NUM_IMAGES, 32).shift_and_flip(
        images, INDICES
    )
    mode = {"zero": "constant", "reflect": "reflect"}[padding]
    seen = set()
    for image, shifted in zip(images.numpy(), result.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (3, 3), (3, 3)), mode=mode)  # pyright: ignore[reportCallIssue, reportArgumentType]
        places = [
            (y, x) for y in range(7) for x in range(7) if np.array_equal(padded[:, y : y + 32, x : x + 32], shifted)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > NUM_IMAGES // 3


def test_alternating_shows_each_image_both_ways_in_any_two_epochs(images: Tensor) -> None:
    recipe = recipe_with(flip="alternating")
    for epoch in range(3):
        first = EpochAugmentation(recipe, 9, epoch, NUM_IMAGES, 32).shift_and_flip(images, INDICES)
        second = EpochAugmentation(recipe, 9, epoch + 1, NUM_IMAGES, 32).shift_and_flip(images, INDICES)
        assert torch.equal(first.flip(3), second)
        flipped = [not torch.equal(a, b) for a, b in zip(first, images, strict=True)]
        assert 0 < sum(flipped) < NUM_IMAGES


@pytest.mark.parametrize(("size", "side"), [(32, 8), (16, 4)])
def test_cutout_blanks_one_square_that_shrinks_with_the_image(size: int, side: int) -> None:
    ones = torch.ones(NUM_IMAGES, 3, size, size)
    result = EpochAugmentation(recipe_with(cutout=8), 0, 0, NUM_IMAGES, 32).cut_out(ones, INDICES)
    assert torch.equal(result[:, 0], result[:, 1])
    holes = (result[:, 0] == 0).numpy()
    for hole in holes:
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        assert side // 2 <= len(rows) <= side
        assert side // 2 <= len(columns) <= side
        assert hole.sum() == len(rows) * len(columns)
    assert holes.reshape(NUM_IMAGES, -1).sum(axis=1).max() == side * side
