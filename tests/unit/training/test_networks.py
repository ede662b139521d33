import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from cifar_assets.contracts import CIFAR10, ImageSpec
from cifar_assets.training.networks import PublishedNetwork, ResNet18, SpeedNet, TrimmedConv2d, build_network
from cifar_assets.training.recipes import get_recipe


def test_the_resnet_is_that_of_torchvision() -> None:
    """Without the taps that only see padding, outputs and gradients equal torchvision's."""
    torch.manual_seed(0)
    ours, theirs = ResNet18(64, 10, 32).double(), resnet18(num_classes=10).double()
    theirs.load_state_dict(ours.torchvision_state_dict())
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for network in (ours, theirs):
        network(images).square().sum().backward()
    conv = ours.layer4[1].conv1
    assert isinstance(conv, TrimmedConv2d)
    expected = dict(theirs.named_parameters())["layer4.1.conv1.weight"].grad
    assert isinstance(conv.weight.grad, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert torch.allclose(conv.weight.grad, expected[:, :, 1:2, 1:2], rtol=1e-6)
    with torch.no_grad():
        assert torch.allclose(ours.eval().float()(images.float()), theirs.eval().float()(images.float()), atol=1e-6)


@pytest.mark.parametrize(("size", "stride"), [(2, 2), (1, 1), (1, 2)])
def test_a_trimmed_convolution_is_the_whole_one(size: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = TrimmedConv2d(3, 5, stride, size)
    assert conv.weight.shape == (5, 3, size, size)
    images = torch.randn(2, 3, size, size)
    expected = nn.functional.conv2d(images, conv.full_kernel(), stride=stride, padding=1)
    assert torch.allclose(conv(images), expected, atol=1e-6)


def test_a_trimmed_convolution_takes_a_smaller_map() -> None:
    conv = TrimmedConv2d(3, 5, 2, 2)
    images = torch.randn(2, 3, 1, 1)
    expected = nn.functional.conv2d(images, conv.full_kernel(), stride=2, padding=1)
    assert torch.allclose(conv(images), expected, atol=1e-6)


def test_resnet18_keeps_the_weights_that_can_matter() -> None:
    assert sum(parameter.numel() for parameter in ResNet18(64, 10, 32).parameters()) == 11_181_642 - 6_946_816


def test_initial_weights_are_drawn_from_torchs_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build_network(get_recipe("resnet18", {"width": 4}), CIFAR10).state_dict()["layer1.0.conv1.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("full_size", [16, 28, 32, 47, 48, 64, 100, 224])
@pytest.mark.parametrize("recipe", ["baseline", "resnet18", "fast"])
def test_every_network_takes_every_size(recipe: str, full_size: int) -> None:
    chosen = get_recipe(recipe, {"width": 4})
    network = build_network(chosen, ImageSpec(classes=("a", "b", "c"), image_size=full_size))
    for size in {full_size, *(phase.size_of(full_size) for phase in chosen.resolutions)}:
        assert network(torch.randn(2, 3, size, size)).shape == (2, 3)


@pytest.mark.parametrize(("size", "axes"), [(32, 12), (64, 24), (224, 24)])
def test_whitening_leaves_uncorrelated_patches_of_unit_variance(size: int, axes: int) -> None:
    torch.manual_seed(0)
    images = nn.functional.avg_pool2d(torch.randn(64, 3, size + 2, size + 2), 3, 1)
    network = SpeedNet(4, 10, size)
    network.set_whitening(images, epsilon=0.0)
    with torch.no_grad():
        patches = network.whiten(images)[:, :axes].transpose(0, 1).flatten(1)
        mirrored = network.whiten(images)[:, axes:].transpose(0, 1).flatten(1)
    covariance = patches @ patches.T / patches.shape[1]
    assert torch.allclose(covariance, torch.eye(axes), atol=1e-3)
    assert torch.allclose(mirrored, -patches)


def test_a_published_network_normalizes_and_averages_over_mirror_images() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        plain = PublishedNetwork(network, mean, std)(images)
        mirrored = PublishedNetwork(network, mean, std, "mirrored")(images)
        assert torch.allclose(plain, network(pixels), atol=1e-5)
        assert torch.allclose(mirrored, (network(pixels) + network(pixels.flip(3))) / 2, atol=1e-5)
