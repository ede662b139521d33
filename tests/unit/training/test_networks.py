import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from cifar_assets.training.networks import BasicBlock, Classifier, ResNet18, SpeedNet, TapConv2d, build_network
from cifar_assets.training.recipes import get_recipe


def test_the_imagenet_resnet_is_that_of_torchvision():
    """Though it leaves out the taps that only meet padding: also their gradients are those of torchvision."""
    torch.manual_seed(0)
    ours, theirs = ResNet18(64, imagenet_stem=True).double(), resnet18(num_classes=10).double()
    theirs.load_state_dict(ours.torchvision_state_dict())
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for network in (ours, theirs):
        network(images).square().sum().backward()
    conv = ours.layer3[1].conv1
    assert isinstance(conv, TapConv2d)
    expected = dict(theirs.named_parameters())["layer3.1.conv1.weight"].grad
    assert isinstance(conv.weight.grad, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert torch.allclose(conv.weight.grad, expected.flatten(2), rtol=1e-6)
    with torch.no_grad():
        assert torch.allclose(ours.eval().float()(images.float()), theirs.eval().float()(images.float()), atol=1e-6)


@pytest.mark.parametrize(("size", "stride", "num_taps"), [(2, 1, 9), (2, 2, 4), (1, 1, 1), (1, 2, 1)])
def test_a_convolution_by_its_live_taps_is_the_convolution(size: int, stride: int, num_taps: int):
    torch.manual_seed(0)
    conv = TapConv2d(3, 5, stride, size)
    assert conv.weight.shape == (5, 3, num_taps)
    images = torch.randn(2, 3, size, size)
    expected = nn.functional.conv2d(images, conv.kernel(), stride=stride, padding=1)
    assert torch.allclose(conv(images), expected, atol=1e-6)


def test_taps_of_a_larger_map_serve_a_smaller_one():
    conv = TapConv2d(3, 5, 1, 2)
    images = torch.randn(2, 3, 1, 1)
    expected = nn.functional.conv2d(images, conv.kernel(), padding=1)
    assert torch.allclose(conv(images), expected, atol=1e-6)


def test_resnet18_keeps_the_weights_that_can_matter():
    assert (
        sum(parameter.numel() for parameter in ResNet18(64, imagenet_stem=True).parameters()) == 11_181_642 - 6_946_816
    )


def test_the_small_stem_leaves_the_eighteen_layers_of_a_resnet_18():
    network = build_network(get_recipe("resnet18", {"network": "resnet18"}))
    kinds = nn.Conv2d | nn.Linear | TapConv2d
    weighted = [m for name, m in network.named_modules() if isinstance(m, kinds) and "down" not in name]
    assert len(weighted) == 18
    assert sum(isinstance(m, BasicBlock) for m in network.modules()) == 8
    theirs = dict(resnet18(num_classes=10).state_dict())
    assert isinstance(network, ResNet18)
    ours = network.torchvision_state_dict()
    assert [name for name, value in ours.items() if theirs[name].shape != value.shape] == ["conv1.weight"]
    assert set(theirs) == set(ours)


def test_initial_weights_are_drawn_from_torchs_generator():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build_network(get_recipe("resnet18", {"width": 4})).state_dict()["layer1.0.conv1.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("size", [16, 24, 32])
@pytest.mark.parametrize("recipe", ["seed", "resnet18", "fast"])
def test_every_network_takes_every_size(recipe: str, size: int):
    network = build_network(get_recipe(recipe, {"width": 4}))
    assert network(torch.randn(3, 3, size, size)).shape == (3, 10)


def test_whitening_leaves_uncorrelated_patches_of_unit_variance():
    torch.manual_seed(0)
    images = nn.functional.avg_pool2d(torch.randn(64, 3, 34, 34), 3, 1)
    network = SpeedNet(4)
    network.set_whitening(images, epsilon=0.0)
    with torch.no_grad():
        patches = network.whiten(images)[:, :12].transpose(0, 1).flatten(1)
        mirrored = network.whiten(images)[:, 12:].transpose(0, 1).flatten(1)
    covariance = patches @ patches.T / patches.shape[1]
    assert torch.allclose(covariance, torch.eye(12), atol=1e-3)
    assert torch.allclose(mirrored, -patches)


def test_a_classifier_normalizes_and_averages_over_mirror_images():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        plain = Classifier(network, mean, std)(images)
        mirrored = Classifier(network, mean, std, "mirrored")(images)
        six = Classifier(network, mean, std, "six")(images)
        assert torch.allclose(plain, network(pixels), atol=1e-5)
        assert torch.allclose(mirrored, (network(pixels) + network(pixels.flip(3))) / 2, atol=1e-5)
        padded = nn.functional.pad(pixels, (1, 1, 1, 1), mode="reflect")
        up, down = padded[:, :, :32, :32], padded[:, :, 2:, 2:]
        shifted = [network(view) for shift in (up, down) for view in (shift, shift.flip(3))]
        assert torch.allclose(six, mirrored / 2 + sum(shifted) / 8, atol=1e-5)
