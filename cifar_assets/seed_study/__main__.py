"""Train a recipe with several seeds and print how accurate it is: `python -m cifar_assets.seed_study --help`.

What was trained before, here or by a backfill of the job seed_study, is not trained again.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from cifar_assets.assets.keys import PROCESSED_DATASET, SEED_STUDY, key_of
from cifar_assets.assets.record import Made, data_version, materializations
from cifar_assets.assets.trained_model import TrainingConfig
from cifar_assets.data_set import DataSet, find_data_set
from cifar_assets.dataset.stores import add_data_set_option
from cifar_assets.deployment import resources_for
from cifar_assets.seed_study.job import ACCURACY, NUM_SEEDS, find_trained, partition_of, spec_of
from cifar_assets.settings import read_settings
from cifar_assets.training.recipes import RECIPES, get_recipe
from cifar_assets.training.spec import json_object
from resources.errors import ConfigError, ExplainedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, and print the table; 1 if a training failed, or with one line on stderr."""
    parser = argparse.ArgumentParser("python -m cifar_assets.seed_study", description=__doc__)
    add_data_set_option(parser)
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="default: that of the data set")
    parser.add_argument(
        *("--seeds", "-n"), type=int, default=5, choices=range(1, NUM_SEEDS + 1), metavar="N", help="seeds 0 to N - 1"
    )
    parser.add_argument("--overrides", default="{}", metavar="JSON", help="fields of the recipe to override")
    parser.add_argument("--start-from", metavar="WEIGHTS", help="as in the config of trained_model")
    options = parser.parse_args(arguments)
    try:
        overrides = json_object("overrides", options.overrides)
        trained = train_seeds(options.data_set, options.recipe, options.seeds, overrides, options.start_from)
    except (ExplainedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if done := {name: made for name, made in trained.items() if made}:
        print(table(done))  # noqa: T201
    if missing := sorted(trained.keys() - done.keys()):
        print(f"error: not trained: {', '.join(missing)}. Run this command again.", file=sys.stderr)  # noqa: T201
    return 1 if missing else 0


def train_seeds(
    name: str, recipe: str | None, num_seeds: int, overrides: Mapping[str, Any], start_from: str | None = None
) -> dict[str, Made | None]:
    """The training of each partition; None where it failed. One run of the job for each that is missing."""
    settings = read_settings()
    data_set = find_data_set(settings, name)
    recipe = recipe or data_set.recipe
    get_recipe(recipe, overrides)  # names fields that do not exist, which Dagster's config ignores
    object_store = resources_for(settings, [data_set])[data_set.named("object_store")]
    trained: dict[str, Made | None] = {}
    with _instance() as instance:
        dataset = _newest_dataset(instance, data_set)
        given: dict[str, Any] = {"dataset_digest": dataset, "overrides": overrides, "start_from": start_from}
        config = TrainingConfig(**given)
        for seed in range(num_seeds):
            partition = partition_of(recipe, seed)
            spec = spec_of(data_set, config, object_store, dataset, partition)
            if find_trained(instance, data_set, spec) is None:
                _launch(data_set, partition, given)
            trained[partition] = find_trained(instance, data_set, spec)
    return trained


def table(trained: Mapping[str, Made]) -> str:
    """The accuracies as a table in Markdown, and the partition nearest to the mean with its model."""
    accuracies = {name: float(str(made.materialization.metadata[ACCURACY].value)) for name, made in trained.items()}
    mean = statistics.mean(accuracies.values())
    deviation = f"{100 * statistics.stdev(accuracies.values()):.2f}" if len(accuracies) > 1 else ""
    nearest = min(accuracies, key=lambda name: abs(accuracies[name] - mean))
    lowest, highest = min(accuracies.values()), max(accuracies.values())
    row = [f"{len(accuracies)}", f"{mean:.2%}", deviation, f"{lowest:.2%}", f"{highest:.2%}", nearest]
    return "\n".join(
        (
            *(f"{name}: {accuracy:.2%}" for name, accuracy in accuracies.items()),
            "| n | test accuracy, mean | standard deviation | lowest | highest | nearest to the mean |",
            "|---|---|---|---|---|---|",
            f"| {' | '.join(row)} |",
            f"Model of {nearest}: {data_version(trained[nearest].materialization)}",
        )
    )


def _instance() -> dg.DagsterInstance:
    """That of `dg launch`."""
    return dg.DagsterInstance.get() if os.environ.get("DAGSTER_HOME") else dg.DagsterInstance.from_config(os.getcwd())


def _newest_dataset(instance: dg.DagsterInstance, data_set: DataSet) -> str:
    key = key_of(data_set, PROCESSED_DATASET)
    newest = next(materializations(instance, key, limit=1), None)
    if newest is None:
        name = key.to_user_string()
        raise ConfigError(f"{name} was never materialized here. Run: dg launch --assets '+key:\"{name}\"'")
    return data_version(newest.materialization)


def _launch(data_set: DataSet, partition: str, config: Mapping[str, Any]) -> None:
    """One run of the job in its own process, as if typed. The event log says how it ended."""
    ops = {data_set.named("train_seed"): {"config": config}}
    command = ["dg", "launch", "--job", data_set.named(SEED_STUDY), "--partition", partition]
    command += ["-m", "cifar_assets.definitions", "--config-json", json.dumps({"ops": ops})]
    print(f"$ {shlex.join(command)}", flush=True)  # noqa: T201
    process = subprocess.Popen([str(Path(sys.executable).with_name("dg")), *command[1:]])
    try:
        process.wait()
    except KeyboardInterrupt:  # the run got it too, and lets its training write a checkpoint
        process.wait()
        raise


if __name__ == "__main__":
    sys.exit(main())
