"""Networks: images (N, 3, size, size), normalized, to logits (N, number of classes)."""

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cifar_assets.contracts import ImageSpec
from cifar_assets.training.convolution import Conv2d
from cifar_assets.training.recipes import Recipe, Views, stem_stride

_WHITENING_BATCH = 100
"""Images whose patches are in memory at a time, in float64."""


class TrimmedConv2d(Conv2d):
    """A 3x3 convolution with padding 1 on a feature map of at most 2x2 pixels, without the taps that only see padding.

    On a map of 1x1 that leaves one tap of nine, with stride 2 on a map of 2x2 four. `size` is that of the input map at
    images of full size.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, size: int):
        super().__init__(inputs, outputs, size, stride)

    def reset_parameters(self) -> None:
        # He initialization by fan-out of the 3x3 kernel, as in torchvision's ResNets
        nn.init.normal_(self.weight, std=math.sqrt(2 / (9 * self.out_channels)))

    def forward(self, input: Tensor) -> Tensor:
        missing = max(0, self.kernel_size[0] - int(input.shape[-1]))
        return super().forward(functional.pad(input, (0, missing, 0, missing)) if missing else input)

    def full_kernel(self) -> Tensor:
        """The weights of the equivalent 3x3 convolution, with zeros for the omitted taps."""
        return _full_kernel(self.weight.detach())


def _full_kernel(weight: Tensor) -> Tensor:
    after = 2 - weight.shape[-1]
    return functional.pad(weight, (1, after, 1, after))


def _conv3x3(inputs: int, outputs: int, stride: int, size: int) -> Conv2d:
    if size == 1 or size == stride == 2:
        return TrimmedConv2d(inputs, outputs, stride, size)
    return Conv2d(inputs, outputs, 3, stride, padding=1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a skip connection (He et al., arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int, size: int):
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride, size)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs, 1, math.ceil(size / stride))
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            None
            if stride == 1 and inputs == outputs
            else nn.Sequential(Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        )

    def forward(self, images: Tensor) -> Tensor:
        shortcut = images if self.downsample is None else self.downsample(images)
        hidden = functional.relu(self.bn1(self.conv1(images)))
        return functional.relu(self.bn2(self.conv2(hidden)) + shortcut)


class ResNet18(nn.Module):
    """ResNet-18 with the parameter names of torchvision's, computing the same function on images up to that size."""

    def __init__(self, width: int, num_classes: int, image_size: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        size = math.ceil(image_size / 4)
        self.layer1 = _stage(width, width, 1, size)
        self.layer2 = _stage(width, 2 * width, 2, size)
        self.layer3 = _stage(2 * width, 4 * width, 2, math.ceil(size / 2))
        self.layer4 = _stage(4 * width, 8 * width, 2, math.ceil(size / 4))
        self.fc = nn.Linear(8 * width, num_classes)
        self._frozen: tuple[nn.Module, ...] = ()
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not isinstance(module, TrimmedConv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.maxpool(functional.relu(self.bn1(self.conv1(images))))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        return self.fc(hidden.mean((2, 3)))

    def freeze(self, stages: int) -> None:
        """Keep weights and batch norm statistics of the first stages; the first is the stem."""
        body = (self.conv1, self.bn1, self.layer1, self.layer2, self.layer3, self.layer4)
        self._frozen = body[: stages + 1] if stages else ()
        for part in self._frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def take_over(self, body: Mapping[str, Tensor]) -> None:
        """Start from the weights of a ResNet-18 of this width for images of any size, without its head.

        They have torchvision's names. Omitted taps count as zeros; those that would only meet padding here are dropped.
        """
        own = self.state_dict()
        for name, value in body.items():
            taps = own[name].shape[-1]
            if value.shape != own[name].shape:
                value = value if value.shape[-1] == 3 else _full_kernel(value)
                value = value if taps == 3 else value[..., 1 : 1 + taps, 1 : 1 + taps]
            own[name].copy_(value)

    def torchvision_state_dict(self) -> dict[str, Tensor]:
        """State dict for torchvision's ResNet-18 of this width."""
        trimmed = {name: module for name, module in self.named_modules() if isinstance(module, TrimmedConv2d)}
        return {**self.state_dict(), **{f"{name}.weight": module.full_kernel() for name, module in trimmed.items()}}


def _stage(inputs: int, outputs: int, stride: int, size: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride, size)
    return nn.Sequential(first, BasicBlock(outputs, outputs, 1, math.ceil(size / stride)))


_MAX_AXES = 24


class SpeedNetStage(nn.Module):
    """Convolution, pooling and further convolutions, each normalized and passed through GELU.

    With more than two convolutions, the first one's output is added to the last one's.
    """

    def __init__(self, inputs: int, outputs: int, depth: int):
        super().__init__()
        self.convs = nn.ModuleList(
            Conv2d(outputs if index else inputs, outputs, 3, padding=1) for index in range(depth)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.dirac_(module.weight.data[: module.in_channels])
            if isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = first = functional.gelu(self.norms[0](functional.max_pool2d(self.convs[0](images), 2)))
        last = len(self.convs) - 1
        for index in range(1, last + 1):
            hidden = self.norms[index](self.convs[index](hidden))
            hidden = functional.gelu(hidden + first if index == last > 1 else hidden)
        return hidden

    def fold_first_norm(self) -> None:
        """Put the first batch norm into its convolution, for inference.

        The output is the same, because max pooling commutes with a norm of positive scale.
        """
        convolution, norm = self.convs[0], self.norms[0]
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        self.convs[0], self.norms[0] = fuse_conv_bn_eval(convolution, norm), nn.Identity()


class SpeedNet(nn.Module):
    """A small net for quick training, in the manner of airbench (Jordan, arXiv:2404.00498).

    A fixed 2x2 convolution whitens the images, convolutions start as identities where shapes allow, batch norm has no
    scale, and global max pooling precedes the head. For images of 48 pixels or more, the first convolution is wider and
    has a stride, and gives no more than the main axes.
    """

    def __init__(self, width: int, num_classes: int, image_size: int, widening: int = 4, depth: int = 2):
        super().__init__()
        stride, wide = stem_stride(image_size), widening * width
        whitened = 2 * min(3 * (stride + 1) ** 2, _MAX_AXES)
        self.whiten = nn.Conv2d(3, whitened, stride + 1, stride, bias=False)
        self.whiten.weight.requires_grad_(False)
        self.stages = nn.Sequential(
            SpeedNetStage(whitened, width, depth), SpeedNetStage(width, wide, depth), SpeedNetStage(wide, wide, depth)
        )
        self.fc = nn.Linear(wide, num_classes, bias=False)
        nn.init.normal_(self.fc.weight, std=1 / wide)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stages(functional.gelu(self.whiten(images)))
        return self.fc(hidden.amax((2, 3)))

    def set_whitening(self, images: Tensor, epsilon: float = 5e-4) -> None:
        """Initialize the first layer with the principal axes of the images' patches: unit variance, both signs."""
        size, stride, number = self.whiten.kernel_size[0], self.whiten.stride[0], self.whiten.out_channels // 2
        moments, count = torch.zeros((3 * size * size, 3 * size * size), dtype=torch.float64, device=images.device), 0
        for part in images.split(_WHITENING_BATCH):
            patches = part.unfold(2, size, stride).unfold(3, size, stride).permute(0, 2, 3, 1, 4, 5)
            patches = patches.reshape(-1, 3 * size * size).to(torch.float64)
            moments, count = moments + patches.T @ patches, count + len(patches)
        values, vectors = torch.linalg.eigh(moments / count)
        axes = (vectors / torch.sqrt(values + epsilon)).T.flip(0)[:number]
        axes = axes.reshape(number, 3, size, size).to(torch.float32)
        self.whiten.weight.data.copy_(torch.cat((axes, -axes)))


def build_network(recipe: Recipe, images: ImageSpec) -> ResNet18 | SpeedNet:
    """The recipe's network for these images, its weights drawn from torch's global generator."""
    num_classes = len(images.classes)
    match recipe.network:
        case "resnet18":
            network = ResNet18(recipe.width, num_classes, images.image_size)
            network.freeze(recipe.freeze)
        case "speednet":
            network = SpeedNet(recipe.width, num_classes, images.image_size, recipe.widening, recipe.depth)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = recipe.batch_norm_momentum
    return network


class PublishedNetwork(nn.Module):
    """What is published: uint8 images (N, 3, size, size) to logits, normalization included."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], views: Views = "plain"):
        super().__init__()
        self.network = network
        self.views: Views = views
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        pixels = ((images.to(torch.float32) / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if self.views == "plain":
            return self.network(pixels)
        logits = self.network(torch.cat((pixels, pixels.flip(3))))
        num_classes = int(logits.shape[1])  # a constant of the ONNX model
        return logits.view(2, -1, num_classes).mean(0)
