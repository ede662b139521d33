"""The steps' commands on a small store: their outputs, exit codes and errors."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from Crypto.PublicKey import ECC
from dagster_pipes import PipesMappingParamsLoader
from yaml import safe_load

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.versions.processed import read_processed
from cifar_assets.dataset.versions.raw import build_raw_version
from cifar_assets.gate import judge
from cifar_assets.model_package import WEIGHTS_FILE
from cifar_assets.pipeline_steps import __main__ as steps
from cifar_assets.pipeline_steps.plan import Plan, parse_plan
from cifar_assets.training.recipes import get_recipe
from cifar_assets.training.spec import parse_spec
from resources.errors import StoreError
from resources.object_store import FolderStore
from resources.pipes_store import STORE_URI_PARAM
from tests.fixtures.models import store_model
from tests.fixtures.tiny_data import TINY_RECIPE, TinyData, store_tiny_data


class Steps:
    """The commands on one store, and their output."""

    def __init__(self, store: FolderStore, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.store = store
        self.outputs = folder / "outputs"
        self._folder = folder
        self._capsys = capsys

    def run(self, *arguments: str) -> int:
        return steps.main(["--store", str(self._folder / "store"), *arguments])

    def data(self, *arguments: str) -> int:
        overrides = f"--overrides={json.dumps(TINY_RECIPE)}"
        defaults = ["--run=run-1", "--recipe=fast", overrides, f"--outputs={self.outputs}"]
        return self.run("data", *defaults, *arguments)

    def processed(self) -> int:
        return self.run("processed", f"--plan={self.outputs / 'plan'}")

    def model(self, threshold: float | str) -> int:
        return self.run(
            "model", f"--plan={self.outputs / 'plan'}", f"--threshold={threshold}", f"--outputs={self.outputs}"
        )

    def plan(self) -> Plan:
        return parse_plan((self.outputs / "plan").read_text())

    @property
    def error(self) -> str:
        return self._capsys.readouterr().err


@pytest.fixture
def pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Steps:
    return Steps(FolderStore(tmp_path / "store"), tmp_path, capsys)


@pytest.fixture
def tiny(pipeline: Steps) -> TinyData:
    return store_tiny_data(pipeline.store, train=60, test=20)


def report_model(pipeline: Steps, seed: int = 0, classes: Sequence[str] = CLASSES, **metrics: float) -> str:
    """Store a model and its result message as the run's training would."""
    plan = pipeline.plan()
    models = pipeline.store.at("models")
    digest = store_model(
        models,
        {"test_accuracy": 0.5, **metrics},
        dataset=plan.spec.dataset_digest,
        raw=plan.raw_digest,
        seed=seed,
        classes=classes,
        recipe=plan.spec.recipe.model_dump(mode="json"),
    )
    payload = {"type": "result", "model_digest": digest, "model_uri": models.uri(digest), "mlflow_unsent": []}
    messages = [
        {"method": "opened", "params": {}},
        {"method": "report_custom_message", "params": {"payload": payload}},
        {"method": "closed", "params": None},
    ]
    models.write(f"{plan.messages_prefix}writer/00000000.jsonl", "\n".join(map(json.dumps, messages)).encode())
    return digest


def test_current_data_is_named_by_digest_and_handed_on(pipeline: Steps, tiny: TinyData) -> None:
    assert pipeline.data("--seed=7", "--replicas=3") == 0
    plan = pipeline.plan()
    assert (plan.raw_digest, plan.spec.dataset_digest) == (tiny.raw, tiny.processed)
    assert (plan.spec.seed, plan.replicas, plan.spec.recipe.width) == (7, 3, TINY_RECIPE["width"])
    assert (pipeline.outputs / "workers").read_text() == "2"
    assert pipeline.processed() == 0


def test_the_trainer_is_given_the_same_spec_and_a_way_to_answer(pipeline: Steps, tiny: TinyData) -> None:
    assert pipeline.data() == 0
    read = {path.name.upper().replace("-", "_"): path.read_text() for path in pipeline.outputs.iterdir()}
    assert parse_spec(read["CIFAR_JOB_SPEC"], "output") == pipeline.plan().spec
    pipes = PipesMappingParamsLoader(read)
    assert pipes.is_dagster_pipes_process()
    expected = pipeline.store.at("models").uri(pipeline.plan().messages_prefix)
    assert pipes.load_messages_params() == {STORE_URI_PARAM: expected}


def test_null_override_means_left_out(pipeline: Steps, tiny: TinyData) -> None:
    assert pipeline.data('--overrides={"epochs": null}', '--execution={"threads": null}') == 0
    fitted = {"batch_size": 32, "epochs": 100}  # to the few training images
    assert pipeline.plan().spec.recipe == get_recipe("fast", fitted)


def test_outputs_are_safe_in_quoted_yaml(pipeline: Steps, tiny: TinyData) -> None:
    assert pipeline.data("--run=it's {{here}}") == 0
    text = (pipeline.outputs / "plan").read_text()
    assert "{{" not in text
    assert parse_plan(safe_load(f"value: '{text}'")["value"]).run == "it's {{here}}"


def test_an_earlier_version_can_be_named(pipeline: Steps, tiny: TinyData) -> None:
    build_raw_version(pipeline.store.at("raw-data"), "synthetic")
    assert pipeline.data() == 1
    assert "was not processed yet" in pipeline.error
    assert pipeline.data(f"--dataset={tiny.processed}") == 0
    assert pipeline.plan().raw_digest == tiny.raw


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--recipe=nope"], "choose one of baseline, best, better, fast, finetune, good, quick, resnet18"),
        (["--overrides={"], "overrides is '{': expected a JSON object"),
        (["--overrides=[1]"], "expected a JSON object"),
        (['--overrides={"layers": 4}'], "overrides: layers cannot be set. Choose from batch_norm_momentum, "),
        (['--overrides={"name": "mine"}'], "overrides: name cannot be set."),
        (['--execution={"thread": 1}'], "execution: thread cannot be set. Choose from checkpoint_every_steps, "),
        (['--execution={"threads": 0}'], "threads"),
        (['--overrides={"cutout": 33}'], "cutout"),
        (["--seed=-1"], "seed"),
        (["--replicas=0"], "replicas"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(pipeline: Steps, tiny: TinyData, arguments: list[str], complaint: str) -> None:
    assert pipeline.data(*arguments) == steps.EXIT_BAD_SETTING
    assert complaint in pipeline.error


def test_nothing_imported_yet(pipeline: Steps) -> None:
    assert pipeline.data() == 1
    assert "materialize cifar10/raw_dataset" in pipeline.error


def test_a_dataset_that_is_not_there(pipeline: Steps, tiny: TinyData) -> None:
    assert pipeline.data(f"--dataset={'f' * 64}") == 1
    assert f"There is no processed version {'f' * 64}" in pipeline.error


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_raw_object_that_is_not_what_its_digest_says(pipeline: Steps, tiny: TinyData, damage: str) -> None:
    raw = pipeline.store.at("raw-data")
    key = next(info.key for info in raw.list("objects/"))
    raw.delete(key) if damage == "missing" else raw.write(key, b"x" + raw.read(key)[1:])
    assert pipeline.data() == 1
    assert key in pipeline.error


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_shard_that_is_not_what_the_manifest_says(pipeline: Steps, tiny: TinyData, damage: str) -> None:
    assert pipeline.data() == 0
    processed = pipeline.store.at("processed-data")
    key = read_processed(processed, tiny.processed).shards["train"][0].file
    processed.delete(key) if damage == "missing" else processed.write(key, processed.read(key)[:-1] + b"?")
    assert pipeline.processed() == 1
    assert key in pipeline.error


def test_a_plan_of_other_raw_data_does_not_match(pipeline: Steps, tiny: TinyData) -> None:
    assert pipeline.data() == 0
    plan = pipeline.plan().model_copy(update={"raw_digest": "0" * 64})
    (pipeline.outputs / "plan").write_text(plan.to_json())
    assert pipeline.processed() == 1
    assert f"was made from raw version {tiny.raw}, expected {'0' * 64}" in pipeline.error


@pytest.mark.parametrize(("threshold", "code"), [(0.5, 0), (0.51, 1)])
def test_the_gate_decides_about_the_runs_own_model(
    pipeline: Steps, tiny: TinyData, threshold: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERMINATION_LOG", str(tmp_path / "reason"))
    assert pipeline.data() == 0
    digest = report_model(pipeline)
    assert pipeline.model(threshold) == code
    report = json.loads((pipeline.outputs / "model").read_text())
    assert report["model_digest"] == digest
    assert report["passed"] is (code == 0)
    if code:
        assert "is below the threshold 0.5100" in (tmp_path / "reason").read_text()


@pytest.mark.parametrize(
    ("classes", "accuracy", "code"),
    [(CLASSES, 0.85, 0), (CLASSES, 0.84, 1), (("cat", "dog"), 0.1, 1), (("cat", "dog"), 0.11, 0)],
)
def test_an_empty_threshold_is_the_default_of_the_gate(
    pipeline: Steps, tiny: TinyData, classes: tuple[str, ...], accuracy: float, code: int
) -> None:
    """The stored confusion matrix has as many test images of each of ten classes."""
    assert pipeline.data() == 0
    digest = report_model(pipeline, classes=classes, test_accuracy=accuracy)
    assert pipeline.model("") == code
    report = json.loads((pipeline.outputs / "model").read_text())
    _, verdict = judge(pipeline.store.at("models"), digest, None)
    assert (report["passed"], report["reason"]) == (verdict.passed, verdict.reason)


def test_a_training_that_left_no_model(pipeline: Steps, tiny: TinyData) -> None:
    assert pipeline.data() == 0
    assert pipeline.model(0) == 1
    assert "The training of run run-1 reported no model" in pipeline.error


def test_a_model_file_that_was_changed(pipeline: Steps, tiny: TinyData) -> None:
    assert pipeline.data() == 0
    digest = report_model(pipeline)
    pipeline.store.at("models").write(f"{digest}/{WEIGHTS_FILE}", b"other weights")
    assert pipeline.model(0) == 1
    assert WEIGHTS_FILE in pipeline.error


def test_an_unsigned_model_when_there_is_a_public_key(
    pipeline: Steps, tiny: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipeline.data() == 0
    report_model(pipeline)
    monkeypatch.setenv("MODEL_PUBLIC_KEY", str(ECC.generate(curve="P-256").public_key().export_key(format="PEM")))
    assert pipeline.model(0) == 1
    assert "has no model.sig, but MODEL_PUBLIC_KEY is set" in pipeline.error
    monkeypatch.setenv("MODEL_PUBLIC_KEY", "missing.pem")
    assert pipeline.model(0) == steps.EXIT_BAD_SETTING


def test_a_model_of_another_seed_than_the_runs(pipeline: Steps, tiny: TinyData) -> None:
    assert pipeline.data() == 0
    report_model(pipeline, seed=5)
    assert pipeline.model(0) == 1
    assert "has seed 5, this run asked for 0" in pipeline.error


def test_store_outage_is_a_transient_failure(pipeline: Steps, tiny: TinyData, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise StoreError("no answer", transient=True)

    monkeypatch.setattr(steps, "judge_raw", away)
    assert pipeline.data() == steps.EXIT_STORE_AWAY
    assert "no answer" in pipeline.error


@pytest.mark.parametrize("text", ["{}", "no-such-file"])
def test_invalid_plan_is_rejected(pipeline: Steps, text: str) -> None:
    assert pipeline.run("processed", f"--plan={text}") == steps.EXIT_BAD_SETTING
    assert "plan" in pipeline.error


def test_the_trainer_takes_the_place_of_its_step(pipeline: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], str]] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        started.append((command[1:], environment["CIFAR_JOB_SPEC"]))
        raise SystemExit

    store_tiny_data(pipeline.store, train=60, test=20)
    assert pipeline.data() == 0
    monkeypatch.setattr("os.execve", execve)
    with pytest.raises(SystemExit):
        pipeline.run("train", f"--plan={pipeline.outputs / 'plan'}")
    ((command, spec),) = started
    assert command == ["-m", "cifar_assets.training"]
    assert parse_spec(spec, "test") == pipeline.plan().spec
