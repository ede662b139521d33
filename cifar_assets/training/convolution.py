"""Convolutions whose weight gradient is fast on small feature maps."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_SMALL_MAP = 64
"""Output pixels up to which oneDNN's bfloat16 weight gradient is slower than the product of matrices."""
_MANY_CHANNELS = 128


class Conv2d(nn.Conv2d):
    """A convolution without bias; images (N, C, H, W), channels last.

    On a CPU in bfloat16, oneDNN (3.x, in torch 2.15) takes 3 to 10 times as long for the weight gradient of a small
    map with many channels as one matrix product (im2col; Chellapilla et al., 2006), which is used there instead.
    """

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, padding: int = 0):
        super().__init__(inputs, outputs, size, stride, padding, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if self._is_slow_in_onednn(input):
            dtype = torch.get_autocast_dtype("cpu")
            return _MatrixGradient.apply(input.to(dtype), self.weight.to(dtype), self.stride[0], self.padding[0])
        return super().forward(input)

    def _is_slow_in_onednn(self, images: Tensor) -> bool:
        is_bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        trains = torch.is_grad_enabled() and self.weight.requires_grad and images.device.type == "cpu"
        positions = math.prod(
            _positions(side, self.kernel_size[0], self.stride[0], int(self.padding[0])) for side in images.shape[2:]
        )
        return is_bfloat16 and trains and self.in_channels >= _MANY_CHANNELS and positions <= _SMALL_MAP


class _MatrixGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(images, weight, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (typed for any number of outputs)
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor, None, None]:
        images, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_images = None
        if ctx.needs_input_grad[0]:
            strides, paddings = [ctx.stride] * 2, [ctx.padding] * 2
            of_images = torch.ops.aten.convolution_backward(
                *(gradient, images, weight, None, strides, paddings, [1, 1], False, [0, 0], 1, [True, False, False])
            )[0]
        by_filter = gradient.transpose(0, 1).reshape(weight.shape[0], -1)
        of_weight = by_filter @ _patches(images, weight.shape[2], ctx.stride, ctx.padding)
        outputs, inputs, size, _ = weight.shape
        return of_images, of_weight.view(outputs, size, size, inputs).permute(0, 3, 1, 2), None, None


def _patches(images: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """The pixels under the kernel at each of its positions, (N * positions, size * size * C)."""
    pixels = functional.pad(images.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).contiguous()
    count, height, width, channels = pixels.shape
    rows, columns = _positions(height, size, stride), _positions(width, size, stride)
    shape = (count, rows, columns, size, size * channels)
    of_image, of_row, of_pixel, _ = pixels.stride()
    view = pixels.as_strided(shape, (of_image, stride * of_row, stride * of_pixel, of_row, 1))
    patches = _scratch(view.numel(), pixels.dtype).view(shape)
    return patches.copy_(view).view(-1, size * size * channels)


def _positions(side: int, size: int, stride: int, padding: int = 0) -> int:
    return (side + 2 * padding - size) // stride + 1


_SCRATCH: dict[torch.dtype, Tensor] = {}


def _scratch(numel: int, dtype: torch.dtype) -> Tensor:
    """Memory for intermediate results, reused because fresh memory would cost a page fault for every 4 KiB.

    It is valid until the next call, so a process trains one network at a time.
    """
    if dtype not in _SCRATCH or _SCRATCH[dtype].numel() < numel:
        _SCRATCH[dtype] = torch.empty(numel, dtype=dtype)
    return _SCRATCH[dtype][:numel]
