import io
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from cifar_assets.contracts import CIFAR10, CLASSES
from cifar_assets.training.networks import PublishedNetwork, ResNet18, build_network
from cifar_assets.training.package import (
    baseline_copy_bytes,
    onnx_bytes,
    onnx_difference,
    weights_bytes,
)
from cifar_assets.training.quantize import int8_bytes, open_session
from cifar_assets.training.recipes import RECIPES, Views, get_recipe
from resources.errors import DataError

IMAGES = np.random.RandomState(0).randint(0, 256, (5, 3, 32, 32)).astype(np.uint8)


def make_network(recipe: str = "resnet18", views: Views = "plain") -> PublishedNetwork:
    torch.manual_seed(0)
    inner = build_network(get_recipe(recipe, {"width": 4}), CIFAR10)
    for module in inner.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after a training, so that folding it matters
            assert module.running_mean is not None
            module.running_mean.normal_(std=0.1)
            nn.init.normal_(module.bias, std=0.1)
    return PublishedNetwork(inner, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), views).eval()


def torch_logits(network: PublishedNetwork) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(IMAGES)).numpy()


@pytest.mark.parametrize("views", ["plain", "mirrored"])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_onnx_answers_as_torch_does(recipe: str, views: Views) -> None:
    network = make_network(recipe, views)
    assert onnx_difference(onnx_bytes(network, 32), IMAGES, torch_logits(network)) < 1e-4


@pytest.mark.parametrize("views", ["plain", "mirrored"])
@pytest.mark.parametrize("is_int8", [False, True])
def test_the_onnx_model_is_what_serving_expects(views: Views, is_int8: bool) -> None:
    model = onnx_bytes(make_network("fast", views), 32)
    session = open_session(int8_bytes(model, IMAGES, 1) if is_int8 else model, 1)
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [3, 32, 32])
    assert (logits.name, logits.type, logits.shape[1:]) == ("logits", "tensor(float)", [len(CLASSES)])
    for count in (1, 4):
        answer = session.run(None, {"images": IMAGES[:count]})[0]
        assert np.asarray(answer).shape == (count, len(CLASSES))


def test_exports_repeat_to_the_byte_and_tell_nothing_of_the_machine() -> None:
    first, second = onnx_bytes(make_network(), 32), onnx_bytes(make_network(), 32)
    assert first == second
    assert weights_bytes(make_network()) == weights_bytes(make_network())
    model = onnx.load_from_string(first)
    texts = [model.doc_string, *(node.doc_string for node in model.graph.node)]
    assert set(texts) == {""}
    assert str(Path.cwd()).encode() not in first


def test_an_onnx_model_of_other_weights_is_refused() -> None:
    other = make_network()
    with torch.no_grad():
        other.network.state_dict()["fc.bias"].add_(1.0)
    with pytest.raises(DataError, match="differs from torch"):
        onnx_difference(onnx_bytes(other, 32), IMAGES, torch_logits(make_network()))


def test_an_onnx_model_whose_output_is_not_finite_is_refused() -> None:
    network = make_network()
    with torch.no_grad():
        network.network.state_dict()["fc.bias"].fill_(float("inf"))
    with pytest.raises(DataError, match="differs from torch"):
        onnx_difference(onnx_bytes(network, 32), IMAGES, torch_logits(make_network()))


def test_the_baseline_copy_is_a_plain_state_dict() -> None:
    network = PublishedNetwork(ResNet18(64, 10, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    loaded = torch.load(io.BytesIO(baseline_copy_bytes(network)), weights_only=True)
    theirs = resnet18(num_classes=10)
    theirs.load_state_dict(loaded)
    assert set(loaded) == set(theirs.state_dict())
