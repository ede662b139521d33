"""Fine-tuning: where a training starts, what stays frozen, and which starts are refused before it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torchvision.models import resnet18

from cifar_assets.contracts import ImageSpec
from cifar_assets.gate import check_made_by
from cifar_assets.model_package import WEIGHTS_FILE, read_manifest, write_package
from cifar_assets.training.distributed import StopSignal, TrainingStopped
from cifar_assets.training.networks import PublishedNetwork, ResNet18
from cifar_assets.training.package import build_package, weights_bytes
from cifar_assets.training.recipes import RECIPES, get_recipe
from cifar_assets.training.spec import JobSpec, build_spec
from cifar_assets.training.start import body_of, body_shapes
from resources.errors import ConfigError, DataError
from resources.object_store import FolderStore, ObjectStore, open_store
from tests.fixtures.models import store_model
from tests.unit.training.small_dataset import store_dataset
from tests.unit.training.test_loop import assert_same, elsewhere, final_tensors, finish, make_trainer

WIDTH = 4
OTHER = ImageSpec(classes=("a", "b", "c"), image_size=32)
SMALL = {"width": WIDTH, "epochs": 2, "batch_size": 16, "precision": "float32"}


def trained_resnet(image_size: int = 32, width: int = WIDTH, num_classes: int = 7) -> ResNet18:
    """A ResNet-18 with weights and statistics unlike initial ones."""
    torch.manual_seed(9)
    network = ResNet18(width, num_classes, image_size)
    for norm in (module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        assert norm.running_mean is not None
        torch.nn.init.normal_(norm.running_mean, std=0.1)
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return network


def torchvision_file(path: Path, change: Callable[[dict[str, Tensor]], object] = lambda tensors: None) -> str:
    tensors = {name: value.contiguous() for name, value in trained_resnet().torchvision_state_dict().items()}
    change(tensors)
    path.write_bytes(save(tensors))
    return str(path)


def store_resnet(models: ObjectStore, network: str = "resnet18") -> str:
    weights = weights_bytes(PublishedNetwork(trained_resnet(), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)))
    return store_model(models, weights=weights, recipe={**get_recipe("resnet18").model_dump(), "network": network})


Launch = Callable[..., JobSpec]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Makes the spec of a short training on three classes, as Dagster does."""
    processed = FolderStore(tmp_path / "processed-data")
    digest = store_dataset(processed.root, images=OTHER)

    def make(start_from: str | None, recipe: str = "finetune", **overrides: Any) -> JobSpec:
        return build_spec(
            *(processed, FolderStore(tmp_path / "models"), digest),
            recipe=recipe,
            overrides={**SMALL, **overrides},
            execution={"threads": 1, "device": "cpu"},
            seed=3,
            mlflow=None,
            start_from=start_from,
            other_models=[FolderStore(tmp_path / "models" / "others")],
        )

    return make


def body_now(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in body_of(network.state_dict()).items()}


def test_the_expected_tensors_are_those_of_torchvision() -> None:
    body = body_of(resnet18(num_classes=3).state_dict())
    assert {name: tuple(value.shape) for name, value in body.items()} == body_shapes(64)


def test_a_network_for_small_images_computes_what_the_weights_of_torchvision_do() -> None:
    torch.manual_seed(0)
    theirs, ours = resnet18(num_classes=3).eval(), ResNet18(64, 3, 32).eval()
    ours.take_over(body_of(theirs.state_dict()))
    ours.fc.load_state_dict(theirs.fc.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(32, 32), (32, 224), (64, 16), (224, 32)])
def test_weights_move_between_image_sizes(before: int, after: int) -> None:
    start, network = trained_resnet(before), ResNet18(WIDTH, 3, after)
    network.take_over(body_of(start.state_dict()))
    first, second = (body_of(each.torchvision_state_dict()) for each in (start, network))
    small = min(before, after)
    seen = ResNet18(WIDTH, 3, small).state_dict()
    for name, value in first.items():
        if value.shape[2:] == (3, 3) and (taps := seen[name].shape[-1]) < 3:
            value, second[name] = (each[..., 1 : 1 + taps, 1 : 1 + taps] for each in (value, second[name]))
        assert torch.equal(value, second[name]), name


def test_a_model_of_another_data_set_is_the_start_and_recorded(launch: Launch, tmp_path: Path) -> None:
    digest = store_resnet(FolderStore(tmp_path / "models" / "others"))
    spec = launch(digest)
    assert spec.start
    assert spec.start.model_digest == digest
    trainer = make_trainer(spec)
    network = trainer.state.network
    assert_same(body_now(network), body_of(trained_resnet().state_dict()))
    assert network.fc.weight.shape == (3, 8 * WIDTH)  # pyright: ignore[reportAttributeAccessIssue]
    finish(trainer)
    statistics = trainer.data.manifest
    manifest, files = build_package(trainer, PublishedNetwork(trainer.published(), statistics.mean, statistics.std))
    models = open_store(spec.output_uri)
    made = write_package(models, manifest, files)
    assert (manifest.start_model, manifest.start_weights) == (digest, spec.start.sha256)
    check_made_by(spec, models, made)
    other = spec.model_copy(update={"start": spec.start.model_copy(update={"sha256": "0" * 64})})
    with pytest.raises(DataError, match=f"{made} has starting weights {spec.start.sha256}, this run asked for 0000"):
        check_made_by(other, models, made)


def test_a_file_with_torchvisions_names_is_the_start(launch: Launch, tmp_path: Path) -> None:
    spec = launch(torchvision_file(tmp_path / "with space.safetensors"))
    assert spec.start
    assert spec.start.model_digest is None
    assert_same(body_now(make_trainer(spec).state.network), body_of(trained_resnet().state_dict()))


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
@pytest.mark.parametrize("freeze", [1, 3, 5])
def test_frozen_stages_keep_their_bits(launch: Launch, tmp_path: Path, freeze: int, optimizer: str) -> None:
    spec = launch(torchvision_file(tmp_path / "start"), freeze=freeze, optimizer=optimizer, learning_rate=0.1)
    trainer = make_trainer(spec)
    before = body_now(trainer.state.network)
    finish(trainer)
    stages = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
    frozen = stages[: freeze + 1]
    same = {name for name, value in body_now(trainer.state.network).items() if torch.equal(value, before[name])}
    assert same == {name for name in before if name.startswith(frozen)}


def test_the_head_learns_at_its_full_rate(launch: Launch, tmp_path: Path) -> None:
    spec = launch(torchvision_file(tmp_path / "start"), body_rate=0.25)
    state, recipe = make_trainer(spec).state, spec.recipe
    names = {id(parameter): name for name, parameter in state.network.named_parameters()}
    groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
    rates = {names[id(each)]: group["initial_lr"] for group in groups for each in group["params"]}
    head, bias = (rate * recipe.batch_size for rate in (recipe.head_learning_rate, recipe.bias_learning_rate))
    assert (rates["fc.weight"], rates["fc.bias"]) == pytest.approx((head, bias))
    body = (rates["conv1.weight"], rates["bn1.weight"], rates["layer1.0.conv1.weight"])
    assert body == pytest.approx((head / 4, bias / 4, recipe.learning_rate / 4))


def test_a_stopped_fine_tuning_resumes_to_the_same_bits(launch: Launch, tmp_path: Path) -> None:
    file = tmp_path / "start"
    spec = launch(torchvision_file(file), freeze=2)
    whole = make_trainer(elsewhere(spec, tmp_path / "whole"))
    finish(whole)
    stop = StopSignal()

    def stop_now() -> None:
        stop.is_set = True

    for _ in range(4):
        stop.is_set = False
        with pytest.raises(TrainingStopped):
            finish(make_trainer(spec, stop), stop_now)
    file.unlink()  # the checkpoint has everything
    trainer = make_trainer(spec)
    assert trainer.resumed_from == 4
    finish(trainer)
    assert_same(final_tensors(whole), final_tensors(trainer))


def test_the_bytes_of_the_start_and_not_its_place_identify_the_job(launch: Launch, tmp_path: Path) -> None:
    spec, moved = (launch(torchvision_file(tmp_path / name)) for name in ("one", "two"))
    other = launch(torchvision_file(tmp_path / "three", lambda tensors: tensors["bn1.bias"].add_(1)))
    assert spec.start != moved.start
    assert spec.identity == moved.identity
    assert len({each.identity for each in (spec, other, spec.model_copy(update={"start": None}))}) == 3


def test_other_recipes_and_models_keep_their_digests(tmp_path: Path) -> None:
    dumped = {name: set(recipe.model_dump()) for name, recipe in RECIPES.items()}
    assert [name for name, fields in dumped.items() if fields & {"freeze", "body_rate"}] == ["finetune"]
    digest = store_model(FolderStore(tmp_path))
    assert not any(
        name.startswith("start") for name in read_manifest(FolderStore(tmp_path / digest), digest).model_dump()
    )


def test_a_start_that_changed_since_the_launch_is_refused(launch: Launch, tmp_path: Path) -> None:
    spec = launch(torchvision_file(tmp_path / "start"))
    torchvision_file(tmp_path / "start", lambda tensors: tensors["bn1.bias"].add_(1))
    with pytest.raises(DataError, match="start: expected sha256"):
        make_trainer(spec)


def test_a_start_that_is_not_finite_is_refused(launch: Launch, tmp_path: Path) -> None:
    spec = launch(torchvision_file(tmp_path / "start", lambda tensors: tensors["bn1.bias"].fill_(float("nan"))))
    with pytest.raises(DataError, match=r"bn1\.bias contains numbers that are not finite"):
        make_trainer(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("bn1.weight"), r"start is not of a ResNet-18 of width 4: bn1\.weight is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"extra is unknown \(1 in all\)"),
        (
            lambda tensors: tensors.update({"conv1.weight": torch.zeros(8, 3, 7, 7)}),
            r"conv1\.weight is F32 \[8, 3, 7, 7\], expected floats \[4, 3, 7, 7\].*override the recipe's `width`",
        ),
        (
            lambda tensors: tensors.update({"layer1.0.conv1.weight": torch.zeros(4, 4, 5, 5)}),
            r"layer1\.0\.conv1\.weight is F32 \[4, 4, 5, 5\]",
        ),
        (lambda tensors: tensors.update({"bn1.bias": torch.zeros(4, dtype=torch.int64)}), r"bn1\.bias is I64"),
    ],
    ids=["missing", "unknown", "width", "kernel", "integers"],
)
def test_a_file_that_does_not_fit_is_refused_before_the_training(
    launch: Launch, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        launch(torchvision_file(tmp_path / "start", change))


def test_a_start_that_is_none_is_refused_before_the_training(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no weights")
    speednet = store_resnet(FolderStore(tmp_path / "models"), network="speednet")
    resnet = torchvision_file(tmp_path / "start")
    for arguments, message in (
        ((None,), "set start_from, or choose another recipe"),
        ((str(tmp_path / "nothing"),), "nothing' is not a file. Expected the digest of a model"),
        ((str(tmp_path),), "is not a file"),
        ((str(tmp_path / "text"),), "text is not a safetensors file"),
        (("a" * 64,), f"there is no model {'a' * 64} in file:.*models/, file:.*models/others/"),
        ((speednet,), f"model {speednet} is a speednet, expected a resnet18"),
        ((resnet, "fast"), "recipe 'fast' trains a speednet, which can only start from random weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            launch(*arguments)


def test_any_recipe_of_the_network_can_start_from_weights(launch: Launch, tmp_path: Path) -> None:
    assert launch(torchvision_file(tmp_path / "start"), "baseline").start


def test_a_local_file_is_refused_if_pods_train(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resources.object_store.s3 import S3Store

    for name, value in (("ENDPOINT_URL", "http://127.0.0.1:9"), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(f"AWS_{name}", value)
    processed = FolderStore(Path(dataset.removeprefix("file://")).parent)
    with pytest.raises(ConfigError, match=r"pods cannot read.*s3://BUCKET/KEY: upload the file"):
        build_spec(
            *(processed, S3Store.from_environment("models"), dataset.rstrip("/").rpartition("/")[2]),
            recipe="finetune",
            overrides=SMALL,
            execution={},
            seed=0,
            mlflow=None,
            start_from=torchvision_file(tmp_path / "start"),
        )


def test_a_spec_with_a_start_survives_a_json_round_trip(launch: Launch, tmp_path: Path) -> None:
    spec = launch(torchvision_file(tmp_path / "start"))
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_stored_weights_are_a_start_as_a_file_too(launch: Launch, tmp_path: Path) -> None:
    models = FolderStore(tmp_path / "elsewhere")
    path = models.local_path(f"{store_resnet(models)}/{WEIGHTS_FILE}")
    assert path
    assert "network.conv1.weight" in load(path.read_bytes())
    assert launch(str(path)).start
