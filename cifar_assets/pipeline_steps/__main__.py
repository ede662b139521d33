"""The pipeline's steps on the command line.

Exit codes: 0, 1 for a check that failed, 2 for a setting that is wrong, 75 for a store that does not answer (worth
trying again). The step `train` becomes the trainer and ends with the trainer's codes. The reason is on stderr, and in
the file that TERMINATION_LOG names, as pods have one.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_assets.dataset.stores import add_store_option, open_stores
from cifar_assets.pipeline_steps.plan import CURRENT, Plan, make_plan, parse_object, parse_plan
from cifar_assets.pipeline_steps.verify import verify_model, verify_processed, verify_raw
from cifar_assets.training.recipes import DEFAULT_RECIPE
from resources.errors import ConfigError, ExplainedError, StoreError
from resources.mlflow.target import MlflowTarget, check_tracking_uri

EXIT_FAILED = 1
EXIT_BAD_SETTING = 2
EXIT_STORE_AWAY = 75
"""EX_TEMPFAIL of sysexits.h."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one step and return its exit code; what went wrong is one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return options.step(options)
    except ExplainedError as error:
        if isinstance(error, ConfigError):
            return _failed(str(error), EXIT_BAD_SETTING)
        is_away = isinstance(error, StoreError) and error.transient
        return _failed(str(error), EXIT_STORE_AWAY if is_away else EXIT_FAILED)


def _data(options: argparse.Namespace) -> int:
    stores = open_stores(options.store)
    plan = make_plan(
        stores,
        run=options.run,
        dataset=options.dataset,
        recipe=options.recipe,
        overrides=parse_object(options.overrides, "overrides"),
        execution=parse_object(options.execution, "execution"),
        seed=options.seed,
        replicas=options.replicas,
        mlflow=_mlflow(options.run),
    )
    images = verify_raw(stores.raw, plan.raw_digest)
    _say(f"Raw version {plan.raw_digest}: every object has its digest, {images:,} images.")
    _say(f"This run trains on processed version {plan.spec.dataset_digest}.")
    outputs = {"plan": plan.to_json(), "workers": str(plan.replicas - 1)}
    outputs |= {name.lower().replace("_", "-"): value for name, value in plan.trainer_environment().items()}
    _write(options.outputs, outputs)
    return 0


def _processed(options: argparse.Namespace) -> int:
    plan: Plan = options.plan
    manifest = verify_processed(open_stores(options.store), plan.spec.dataset_digest, plan.raw_digest)
    counts = ", ".join(f"{manifest.count(split):,} {split}" for split in manifest.counts)
    _say(f"Processed version {plan.spec.dataset_digest}: every file has its digest; {counts} images.")
    return 0


def _train(options: argparse.Namespace) -> int:
    plan: Plan = options.plan
    if plan.replicas > 1:
        raise ConfigError(f"The plan asks for {plan.replicas} replicas; this step trains in one process.")
    # In this process's place, so that whoever ends the step ends the training, and waits for its checkpoint.
    command = [sys.executable, "-m", "cifar_assets.training"]
    os.execve(sys.executable, command, {**os.environ, **plan.trainer_environment()})


def _model(options: argparse.Namespace) -> int:
    report = verify_model(open_stores(options.store).models, options.plan, options.threshold)
    _write(options.outputs, {"model": report.to_json()})
    verdict = report.verdict
    if not verdict.passed:
        return _failed(f"{verdict.reason}. Train longer, with more data, or by another recipe.", EXIT_FAILED)
    _say(f"{verdict.reason}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m cifar_assets.pipeline_steps", description=__doc__)
    add_store_option(parser)
    steps = parser.add_subparsers(required=True, metavar="step")

    step = steps.add_parser("data", help="name the data by digest, compare every raw object, and plan the run")
    step.add_argument("--run", required=True, help="name of the run; no two share one")
    step.add_argument("--dataset", default=CURRENT, help="digest of a processed version (default: %(default)s)")
    step.add_argument("--recipe", default=DEFAULT_RECIPE, help="what to train (default: %(default)s)")
    step.add_argument("--overrides", default="{}", help="fields of the recipe to change, as JSON")
    step.add_argument("--execution", default="{}", help="how to train where it runs, such as threads, as JSON")
    step.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    step.add_argument("--replicas", type=int, default=1, help="pods that train (default: %(default)s)")
    step.add_argument("--outputs", type=Path, required=True, help="folder for the plan and what comes of it")
    step.set_defaults(step=_data)

    step = steps.add_parser("processed", help="compare every file of the processed version with its manifest")
    step.set_defaults(step=_processed)
    _add_plan(step)

    step = steps.add_parser("train", help="train in this place; Argo's workflow has a PyTorchJob instead")
    step.set_defaults(step=_train)
    _add_plan(step)

    step = steps.add_parser("model", help="compare every file of the model, and hold it against the threshold")
    step.add_argument("--threshold", type=_fraction, required=True, help="lowest test accuracy, from 0 to 1")
    step.add_argument("--outputs", type=Path, required=True, help="folder for the report")
    step.set_defaults(step=_model)
    _add_plan(step)
    return parser


def _add_plan(step: argparse.ArgumentParser) -> None:
    step.add_argument("--plan", type=_plan, required=True, help="the plan that the step `data` wrote: a file or JSON")


def _plan(text: str) -> Plan:
    try:
        return parse_plan(text if text.lstrip().startswith("{") else Path(text).read_text())
    except (ConfigError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction from 0 to 1")
    return value


def _mlflow(run: str) -> MlflowTarget | None:
    uri = check_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", ""), "MLFLOW_TRACKING_URI")
    return MlflowTarget(tracking_uri=uri, run_name=run, tags={"pipeline_run": run}) if uri else None


def _write(folder: Path, outputs: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in outputs.items():
        Path(folder, name).write_text(value)


def _failed(reason: str, code: int) -> int:
    sys.stderr.write(f"error: {reason}\n")
    if path := os.environ.get("TERMINATION_LOG"):
        Path(path).write_text(reason)
    return code


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
