import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from cifar_assets.training.networks import BasicBlock, Classifier, ResNet18, SpeedNet, build_network
from cifar_assets.training.recipes import get_recipe


def test_the_imagenet_resnet_is_that_of_torchvision():
    ours, theirs = ResNet18(64, imagenet_stem=True).eval(), resnet18(num_classes=10).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)


def test_the_small_stem_leaves_the_eighteen_layers_of_a_resnet_18():
    network = build_network(get_recipe("resnet18", {"network": "resnet18"}))
    weighted = [m for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "down" not in name]
    assert len(weighted) == 18
    assert sum(isinstance(m, BasicBlock) for m in network.modules()) == 8
    theirs = dict(resnet18(num_classes=10).state_dict())
    different = [name for name, value in network.state_dict().items() if theirs[name].shape != value.shape]
    assert different == ["conv1.weight"]
    assert set(theirs) == set(network.state_dict())


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
        mirrored = Classifier(network, mean, std, mirror=True)(images)
        assert torch.allclose(plain, network(pixels), atol=1e-5)
        assert torch.allclose(mirrored, (network(pixels) + network(pixels.flip(3))) / 2, atol=1e-5)
