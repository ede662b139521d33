"""The pipeline's steps on the command line.

Exit codes: 0, 1 for a failed check, 2 for an invalid setting, 75 for a store that does not respond (retryable). The
step `train` is replaced by the trainer process and has its exit codes. The reason is written to stderr and, in pods, to
the file that TERMINATION_LOG names.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from cifar_assets.dataset.stores import add_store_option, open_stores
from cifar_assets.dataset.versions.processed import read_processed
from cifar_assets.dataset.versions.raw import read_raw
from cifar_assets.dataset.versions.verdicts import judge_processed, judge_raw
from cifar_assets.gate import ACCURACY_CHECK, check_made_by, judge, judge_model
from cifar_assets.model_package import read_file
from cifar_assets.pipeline_steps.plan import Plan, current_dataset, parse_plan
from cifar_assets.training.recipes import DEFAULT_RECIPE
from cifar_assets.training.spec import build_spec, json_object
from resources.errors import ConfigError, DataError, ExplainedError, StoreError
from resources.mlflow.target import MlflowTarget, check_tracking_uri
from resources.model_signature import PUBLIC_KEY_VARIABLE
from resources.verdict import Judges, objections

CURRENT = "current"
"""Alias for a dataset's digest: the processed version of the current raw version."""
EXIT_FAILED = 1
EXIT_BAD_SETTING = 2
EXIT_STORE_AWAY = 75
"""EX_TEMPFAIL of sysexits.h."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one step and return its exit code; an error is one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        options.step(options)
    except ExplainedError as error:
        sys.stderr.write(f"error: {error}\n")
        if path := os.environ.get("TERMINATION_LOG"):
            Path(path).write_text(str(error))
        if isinstance(error, ConfigError):
            return EXIT_BAD_SETTING
        return EXIT_STORE_AWAY if isinstance(error, StoreError) and error.transient else EXIT_FAILED
    return 0


def _data(options: argparse.Namespace) -> None:
    mlflow, stores = _mlflow(options.run), open_stores(options.store)
    digest = current_dataset(stores) if options.dataset == CURRENT else options.dataset
    manifest = read_processed(stores.processed, digest)
    spec = build_spec(
        stores.processed,
        stores.models,
        digest,
        recipe=options.recipe,
        overrides=json_object("overrides", options.overrides),
        execution=json_object("execution", options.execution),
        seed=options.seed,
        mlflow=mlflow,
    )
    raw_digest = manifest.raw_digest
    try:
        plan = Plan(run=options.run, raw_digest=raw_digest, replicas=options.replicas, spec=spec)
    except ValidationError as error:
        raise ConfigError(f"The run's settings are not valid: {error}") from error
    images = read_raw(stores.raw, raw_digest).rows
    _require(judge_raw(stores.raw, raw_digest), f"Raw version {raw_digest}")
    _say(f"Raw version {raw_digest}: every object has its digest, {images:,} images.")
    _say(f"This run trains on processed version {digest}.")
    outputs = {name.lower().replace("_", "-"): value for name, value in plan.trainer_environment().items()}
    _write(options.outputs, {"plan": plan.to_json(), "workers": str(plan.replicas - 1), **outputs})


def _processed(options: argparse.Namespace) -> None:
    plan, stores = _plan(options), open_stores(options.store)
    digest = plan.spec.dataset_digest
    manifest = read_processed(stores.processed, digest)
    if manifest.raw_digest != plan.raw_digest:
        raise DataError(
            f"Processed version {digest} was made from raw version {manifest.raw_digest}, expected {plan.raw_digest}: "
            "materialize cifar10/processed_dataset again."
        )
    _require(judge_processed(stores.raw, stores.processed, digest), f"Processed version {digest}")
    counts = ", ".join(f"{manifest.count(split):,} {split}" for split in manifest.counts)
    _say(f"Processed version {digest}: every file has its digest; {counts} images.")


def _train(options: argparse.Namespace) -> None:
    plan = _plan(options)
    if plan.replicas > 1:
        raise ConfigError(f"The plan has {plan.replicas} replicas, but this step trains in one process.")
    # Replaces this process, so that stopping the step stops the training and waits for its checkpoint.
    command = [sys.executable, "-m", "cifar_assets.training"]
    os.execve(sys.executable, command, {**os.environ, **plan.trainer_environment()})


def _model(options: argparse.Namespace) -> None:
    """Judge the model that this run's training reported, with the same rules as the blocking checks in Dagster.

    The verdict decides the outcome of the workflow. Dagster does not use it to deploy, only its own event log.
    """
    plan, models = _plan(options), open_stores(options.store).models
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise ConfigError(f"--threshold is {options.threshold}: expected a fraction from 0 to 1.")
    result = plan.training_result(models)
    digest = str(result["model_digest"])
    manifest, verdict = judge(models, digest, options.threshold, os.environ.get(PUBLIC_KEY_VARIABLE))
    for name in manifest.files:
        read_file(models.at(digest), manifest, name)
    check_made_by(plan.spec, models, digest)
    others = judge_model(models, digest, options.threshold)
    verdict = verdict.and_no(objections({name: judge for name, judge in others.items() if name != ACCURACY_CHECK}))
    report = {"version": 1, **result, "passed": verdict.passed, "reason": verdict.reason, **verdict.numbers}
    _write(options.outputs, {"model": json.dumps(report, sort_keys=True)})
    if not verdict.passed:
        raise DataError(f"{verdict.reason}. Train longer, with more data, or with another recipe.")
    _say(f"{verdict.reason}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m cifar_assets.pipeline_steps", description=__doc__)
    add_store_option(parser)
    steps = parser.add_subparsers(required=True, metavar="step")

    step = steps.add_parser("data", help="resolve the data to digests, verify every raw object, and plan the run")
    step.add_argument("--run", required=True, help="unique name of the run")
    step.add_argument("--dataset", default=CURRENT, help="digest of a processed version (default: %(default)s)")
    step.add_argument("--recipe", default=DEFAULT_RECIPE, help="what to train (default: %(default)s)")
    step.add_argument("--overrides", default="{}", help="recipe fields to override, as JSON")
    step.add_argument("--execution", default="{}", help="execution settings, such as threads, as JSON")
    step.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    step.add_argument("--replicas", type=int, default=1, help="number of training pods (default: %(default)s)")
    step.add_argument("--outputs", type=Path, required=True, help="folder for the plan and its results")
    step.set_defaults(step=_data)

    for name, run, what in (
        ("processed", _processed, "verify every file of the processed version against its manifest"),
        ("train", _train, "train in this process; Argo's workflow uses a PyTorchJob instead"),
        ("model", _model, "verify every file of the model, and compare its accuracy with the threshold"),
    ):
        step = steps.add_parser(name, help=what)
        step.add_argument("--plan", required=True, help="the plan that the step `data` wrote: a file or JSON")
        step.set_defaults(step=run)
    step.add_argument(
        "--threshold",
        type=fraction,
        help="lowest test accuracy, from 0 to 1 (default: 0.85 for CIFAR-10, for other images more than always naming "
        "the most frequent class)",
    )
    step.add_argument("--outputs", type=Path, required=True, help="folder for the report")
    return parser


def fraction(text: str) -> float | None:
    """A number, or None for an empty workflow parameter."""
    return float(text) if text else None


def _plan(options: argparse.Namespace) -> Plan:
    if options.plan.lstrip().startswith("{"):
        return parse_plan(options.plan)
    try:
        return parse_plan(Path(options.plan).read_text())
    except OSError as error:
        raise ConfigError(f"The plan cannot be read: {error}.") from error


def _mlflow(run: str) -> MlflowTarget | None:
    uri = check_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", ""), "MLFLOW_TRACKING_URI")
    return MlflowTarget(tracking_uri=uri, run_name=run, tags={"pipeline_run": run}) if uri else None


def _require(judges: Judges, what: str) -> None:
    if reasons := objections(judges):
        raise DataError(f"{what} is refused. {' '.join(reasons)}")


def _write(folder: Path, outputs: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in outputs.items():
        Path(folder, name).write_text(value)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
