"""Networks: CIFAR images (N, 3, size, size), normalized, to logits (N, 10)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cifar_assets.contracts import CLASSES, IMAGE_SIZE
from cifar_assets.training.recipes import Recipe, Views


class TapConv2d(nn.Module):
    """A 3x3 convolution with padding 1 on a map of at most 2x2 pixels, as one matrix product.

    Holds only the taps that meet the map; the others of the kernel would only meet padding. On a map of 1x1 that is one
    of nine.

    Args:
        inputs: channels.
        outputs: channels.
        stride: of the convolution.
        size: of the input map at 32-pixel images, in pixels; smaller maps use fewer of the taps.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, size: int):
        super().__init__()
        self._stride = stride
        self._taps = sorted({tap for row in _taps(size, stride) for tap in row if tap is not None})
        self.weight = nn.Parameter(torch.empty(outputs, inputs, len(self._taps)))
        nn.init.normal_(self.weight, std=_kaiming_std(outputs))

    def forward(self, images: Tensor) -> Tensor:
        size = int(images.shape[-1])
        table = _taps(size, self._stride)
        absent = len(self._taps)
        places = [self._taps.index(tap) if tap in self._taps else absent for row in table for tap in row]
        outputs, inputs, _ = self.weight.shape
        taps = functional.pad(self.weight, (0, 1))[:, :, torch.tensor(places, device=images.device)]
        matrix = taps.view(outputs, inputs, len(table), -1).permute(2, 0, 3, 1).reshape(len(table) * outputs, -1)
        flat = functional.linear(images.permute(0, 2, 3, 1).flatten(1), matrix)
        edge = -(-size // self._stride)
        return flat.view(-1, edge, edge, outputs).permute(0, 3, 1, 2)

    def kernel(self) -> Tensor:
        """The weights as those of a 3x3 convolution, zero in the taps that are not here."""
        kernel = self.weight.new_zeros((*self.weight.shape[:2], 9))
        kernel[:, :, self._taps] = self.weight.detach()
        return kernel.unflatten(2, (3, 3))


def _taps(size: int, stride: int) -> list[list[int | None]]:
    """For each pixel of the output map the tap of a 3x3 kernel that meets each pixel of the input map, if one does."""
    edge = -(-size // stride)

    def tap(row: int, column: int) -> int | None:
        return 3 * row + column if 0 <= row < 3 and 0 <= column < 3 else None

    return [
        [tap(i - stride * y + 1, j - stride * x + 1) for i in range(size) for j in range(size)]
        for y in range(edge)
        for x in range(edge)
    ]


def _kaiming_std(outputs: int) -> float:
    """Of He initialization by fan-out of a 3x3 kernel, as torchvision's ResNets have it."""
    return math.sqrt(2 / (9 * outputs))


def _conv3x3(inputs: int, outputs: int, stride: int, size: int) -> nn.Module:
    if size <= 2:
        return TapConv2d(inputs, outputs, stride, size)
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added (He et al., arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int, size: int):
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride, size)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs, 1, size // stride)
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
    """ResNet-18 with the parameter names of torchvision's, computing the same function on CIFAR images.

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
        size = IMAGE_SIZE // (4 if imagenet_stem else 2)
        self.layer1 = _stage(width, width, 1, size)
        self.layer2 = _stage(width, 2 * width, 2, size)
        self.layer3 = _stage(2 * width, 4 * width, 2, size // 2)
        self.layer4 = _stage(4 * width, 8 * width, 2, size // 4)
        self.fc = nn.Linear(8 * width, len(CLASSES))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.maxpool(functional.relu(self.bn1(self.conv1(images))))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        return self.fc(hidden.mean((2, 3)))

    def torchvision_state_dict(self) -> dict[str, Tensor]:
        """State dict for torchvision's ResNet-18 of this width and stem."""
        kernels = {f"{name}.weight": m.kernel() for name, m in self.named_modules() if isinstance(m, TapConv2d)}
        return {**self.state_dict(), **kernels}


def _stage(inputs: int, outputs: int, stride: int, size: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, outputs, stride, size), BasicBlock(outputs, outputs, 1, size // stride))


class SpeedNetStage(nn.Module):
    """Convolution, pooling and further convolutions, each normalized and passed through GELU.

    With more than two convolutions the first one's output is added to the last one's.
    """

    def __init__(self, inputs: int, outputs: int, depth: int):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(outputs if index else inputs, outputs, 3, padding=1, bias=False) for index in range(depth)
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


class SpeedNet(nn.Module):
    """A small net for quick training, in the manner of airbench (Jordan, arXiv:2404.00498).

    A fixed 2x2 convolution whitens the images, convolutions start as identities where shapes allow, batch norm has no
    scale, and the largest activation over the picture decides.

    Args:
        width: channels of the first stage.
        widening: channels of the other two stages, as a multiple of `width`.
        depth: convolutions in each stage.
    """

    def __init__(self, width: int = 64, widening: int = 4, depth: int = 2):
        super().__init__()
        whitened, wide = 2 * 3 * 2 * 2, widening * width
        self.whiten = nn.Conv2d(3, whitened, 2, bias=False)
        self.whiten.weight.requires_grad_(False)
        self.stages = nn.Sequential(
            SpeedNetStage(whitened, width, depth), SpeedNetStage(width, wide, depth), SpeedNetStage(wide, wide, depth)
        )
        self.fc = nn.Linear(wide, len(CLASSES), bias=False)
        nn.init.normal_(self.fc.weight, std=1 / wide)

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
            return SpeedNet(recipe.width, recipe.widening, recipe.depth)


class Classifier(nn.Module):
    """What is published: uint8 images (N, 3, 32, 32) to logits (N, 10), normalization included.

    Args:
        network: takes normalized images.
        mean: of each channel, in units where a full pixel is 1.
        std: of each channel, likewise.
        views: what the logits are averaged over.
    """

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
        logits = self._mirrored(pixels)
        if self.views == "six":
            padded = functional.pad(pixels, (1, 1, 1, 1), mode="reflect")
            shifted = self._mirrored(padded[:, :, :-2, :-2]) + self._mirrored(padded[:, :, 2:, 2:])
            logits = logits / 2 + shifted / 4
        return logits

    def _mirrored(self, pixels: Tensor) -> Tensor:
        return (self.network(pixels) + self.network(pixels.flip(3))) / 2
