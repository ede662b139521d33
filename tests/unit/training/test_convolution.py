import pytest
import torch
from torch import Tensor, nn

from cifar_assets.training.convolution import Conv2d

MANY = 128


def run(conv: nn.Conv2d, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The outputs of a step in that precision, and the gradients of images and weights."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = conv(images)
    (outputs.float() * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).sum().backward()
    gradients = [images.grad, conv.weight.grad]
    return outputs, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("map_size", [1, 2, 5, 8])
@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (1, 1, 0)])
def test_a_step_is_that_of_float32(size: int, stride: int, padding: int, map_size: int) -> None:
    torch.manual_seed(0)
    conv = Conv2d(MANY, 6, size, stride, padding).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(MANY, 6, size, stride, padding, bias=False)
    plain.load_state_dict(conv.state_dict())
    images = torch.randn(4, MANY, map_size, map_size).to(memory_format=torch.channels_last)
    outputs, gradients = run(conv, images, torch.bfloat16)
    expected, expected_gradients = run(plain, images, torch.float32)
    assert "MatrixGradient" in str(outputs.grad_fn)
    for found, exact in zip([outputs, *gradients], [expected, *expected_gradients], strict=True):
        assert found.float().sub(exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(("channels", "map_size"), [(MANY - 1, 4), (MANY, 16)])
def test_few_channels_and_large_maps_are_left_to_torch(channels: int, map_size: int) -> None:
    outputs, _ = run(Conv2d(channels, 2, 3, padding=1), torch.randn(2, channels, map_size, map_size), torch.bfloat16)
    assert "MatrixGradient" not in str(outputs.grad_fn)


def test_float32_and_inference_are_left_to_torch() -> None:
    conv, images = Conv2d(MANY, 2, 3, padding=1), torch.randn(2, MANY, 4, 4)
    assert "MatrixGradient" not in str(conv(images).grad_fn)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert conv(images).grad_fn is None
