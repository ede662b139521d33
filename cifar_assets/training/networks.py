"""Networks: CIFAR images (N, 3, size, size), normalized, to logits (N, 10)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cifar_assets.contracts import CLASSES
from cifar_assets.training.recipes import Recipe


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added (He et al., arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            None
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, images: Tensor) -> Tensor:
        shortcut = images if self.downsample is None else self.downsample(images)
        hidden = functional.relu(self.bn1(self.conv1(images)))
        return functional.relu(self.bn2(self.conv2(hidden)) + shortcut)


class ResNet18(nn.Module):
    """ResNet-18 with the parameter names of torchvision's, so that state dicts fit both.

    Args:
        width: channels of the first stage; 64 is the original.
        imagenet_stem: 7x7 stride-2 convolution and max pooling in place of a 3x3 stride-2 convolution.
    """

    def __init__(self, width: int = 64, imagenet_stem: bool = False):
        super().__init__()
        self.conv1 = (
            nn.Conv2d(3, width, 7, 2, 3, bias=False) if imagenet_stem else nn.Conv2d(3, width, 3, 2, 1, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet_stem else nn.Identity()
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.fc = nn.Linear(8 * width, len(CLASSES))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.maxpool(functional.relu(self.bn1(self.conv1(images))))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        return self.fc(hidden.mean((2, 3)))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))


class SpeedNetStage(nn.Module):
    """Convolution, pooling, convolution, each convolution normalized and passed through GELU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.gelu(self.bn1(functional.max_pool2d(self.conv1(images), 2)))
        return functional.gelu(self.bn2(self.conv2(hidden)))


class SpeedNet(nn.Module):
    """A small net for quick training, in the manner of airbench (Jordan, arXiv:2404.00498).

    A fixed 2x2 convolution whitens the images, convolutions start as identities where shapes allow, and the largest
    activation over the picture decides.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        whitened = 2 * 3 * 2 * 2
        self.whiten = nn.Conv2d(3, whitened, 2)
        self.stages = nn.Sequential(
            SpeedNetStage(whitened, width), SpeedNetStage(width, 4 * width), SpeedNetStage(4 * width, 4 * width)
        )
        self.fc = nn.Linear(4 * width, len(CLASSES), bias=False)
        for stage in self.stages:
            for module in stage.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.dirac_(module.weight.data[: module.in_channels])
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # pyright: ignore[reportArgumentType] (a Conv2d made with a bias has one)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stages(functional.gelu(self.whiten(images)))
        return self.fc(hidden.amax((2, 3)))

    def set_whitening(self, images: Tensor, epsilon: float = 5e-4) -> None:
        """Fill the first layer with the principal axes of the images' 2x2 patches, at unit variance, in both signs."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).to(torch.float64)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        axes = (vectors / torch.sqrt(values + epsilon)).T.flip(0).reshape(12, 3, 2, 2).to(torch.float32)
        self.whiten.weight.data.copy_(torch.cat((axes, -axes)))


def build_network(recipe: Recipe) -> ResNet18 | SpeedNet:
    """The recipe's network, its weights drawn from torch's global generator."""
    match recipe.network:
        case "resnet18-imagenet":
            return ResNet18(recipe.width, imagenet_stem=True)
        case "resnet18":
            return ResNet18(recipe.width)
        case "speednet":
            return SpeedNet(recipe.width)


class Classifier(nn.Module):
    """What is published: uint8 images (N, 3, 32, 32) to logits (N, 10), normalization included.

    Args:
        network: takes normalized images.
        mean: of each channel, in units where a full pixel is 1.
        std: of each channel, likewise.
        mirror: average the logits of each image and its mirror image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], mirror: bool = False):
        super().__init__()
        self.network = network
        self.mirror = mirror
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.to(torch.float32) / 255 - self.mean) / self.std
        logits = self.network(pixels)
        if self.mirror:
            logits = (logits + self.network(pixels.flip(3))) / 2
        return logits
