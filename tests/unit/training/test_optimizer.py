import pytest
import torch
from torch import nn

from cifar_assets.contracts import CIFAR10
from cifar_assets.training.networks import build_network
from cifar_assets.training.optimizer import Muon, build_optimizers, orthogonalize
from cifar_assets.training.recipes import RECIPES, get_recipe


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (12, 12)])
def test_singular_values_become_nearly_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    """Three iterations bring every singular value that is not tiny close to 1, by the quintic each."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert torch.allclose(orthogonalize(matrix), left @ torch.diag(values) @ right, atol=1e-6)


def test_a_step_of_muon_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    bank = nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last))
    gradients = [torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)]
    optimizer = Muon([bank], lr=0.1, momentum=0.6, dtype=torch.float32)
    expected, buffer = bank.detach().clone(), torch.zeros(6, 4, 3, 3)
    for gradient in gradients:
        buffer = 0.6 * buffer + gradient
        direction = orthogonalize((gradient + 0.6 * buffer).reshape(6, 36)).reshape(6, 4, 3, 3)
        expected = expected * 6**0.5 / expected.norm() - 0.1 * direction
        bank.grad = gradient
        optimizer.step()
    assert torch.allclose(bank, expected, atol=1e-5)


def test_orthogonalization_in_bfloat16_is_close_to_that_in_float32() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(16, 144)
    exact, rounded = orthogonalize(matrix), orthogonalize(matrix.to(torch.bfloat16)).float()
    assert (exact - rounded).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_trained_parameter_has_one_optimizer(name: str) -> None:
    recipe = get_recipe(name, {"width": 4})
    network = build_network(recipe, CIFAR10)
    optimizers = build_optimizers(network, recipe, torch.float32)
    found = [parameter for o in optimizers for group in o.param_groups for parameter in group["params"]]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert len(found) == len(trained)
    assert {id(parameter) for parameter in found} == {id(parameter) for parameter in trained}


def test_muon_trains_the_inner_convolutions_of_a_resnet() -> None:
    recipe = get_recipe("resnet18", {"width": 4})
    network = build_network(recipe, CIFAR10)
    muon, sgd = build_optimizers(network, recipe, torch.float32)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    filters = {names[id(parameter)] for parameter in muon.param_groups[0]["params"]}
    assert len(filters) == 19
    assert all("conv" in name or "downsample.0" in name for name in filters)
    assert {names[id(parameter)] for parameter in sgd.param_groups[0]["params"]} == {"conv1.weight", "fc.weight"}
    assert sgd.param_groups[0]["initial_lr"] == pytest.approx(1e-4 * 512)
