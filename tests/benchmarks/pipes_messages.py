"""What messages of a trainer cost its step: with 10,000 of them and without, in turns.

    python tests/benchmarks/pipes_messages.py [--rounds 2] [--seconds 60]

In place of a training, a process multiplies matrices on every core for that long, the same number of times with and
without messages. Each message reports an epoch, which becomes an observation in Dagster. The aim: at most 3 % more.
"""

import argparse
import os
import statistics
import tempfile
import time

import dagster as dg
import numpy as np
from dagster_pipes import open_dagster_pipes

from resources.pipes_store import PipesStoreMessageWriter
from resources.trainer.contract import JOB_SPEC_VARIABLE, TrainingSpec
from resources.trainer.interface import TrainingScale
from resources.trainer.local import LocalTrainer

NUM_MESSAGES = 10_000


class LoadSpec(TrainingSpec):
    """A stand-in for a training: so many matrix products, and messages between them."""

    num_products: int
    num_messages: int

    @property
    def name(self) -> str:
        return "load"

    @property
    def identity(self) -> str:
        return "load"


def load_machine(spec: LoadSpec) -> None:
    """What the trainer's process does in `messages`."""
    matrix = np.random.default_rng(0).random((1024, 1024), np.float32)
    metrics = {"epochs": spec.num_messages, "train_loss": 1.0, "validation_accuracy": 0.5, "images_per_second": 1e3}
    with open_dagster_pipes(message_writer=PipesStoreMessageWriter()) as pipes:
        sent = 0
        for number in range(1, spec.num_products + 1):
            matrix.dot(matrix)
            while sent < number * spec.num_messages // spec.num_products:
                sent += 1
                pipes.report_custom_message({"type": "epoch", "epoch": sent, **metrics})
        pipes.report_custom_message({"type": "result", "model_digest": "0" * 64, "model_uri": "file:///unused/"})


def messages(rounds: int, seconds: float) -> None:
    """Steps with and without messages in turns."""
    matrix = np.random.default_rng(0).random((1024, 1024), np.float32)
    products = 50
    for _ in range(2):  # the first ones start threads
        started = time.perf_counter()
        for _ in range(50):
            matrix.dot(matrix)
        products = int(50 * seconds / (time.perf_counter() - started))
    took: dict[int, list[float]] = {0: [], NUM_MESSAGES: []}
    cpu: dict[int, list[float]] = {0: [], NUM_MESSAGES: []}
    quiet = {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}

    @dg.asset
    def trained(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        spec = LoadSpec(num_products=products, num_messages=number)
        started, used = time.perf_counter(), time.process_time()
        LocalTrainer(module="tests.benchmarks.pipes_messages").train(context, spec, TrainingScale(), {})
        took[number].append(time.perf_counter() - started)
        cpu[number].append(time.process_time() - used)
        return dg.MaterializeResult()

    for _ in range(rounds):
        for number in took:
            with tempfile.TemporaryDirectory() as name, dg.DagsterInstance.local_temp(name) as instance:
                dg.materialize([trained], instance=instance, run_config=quiet)
                took_text = f"{took[number][-1]:.1f} s, {cpu[number][-1]:.1f} s of CPU time in Dagster's process"
                print(f"{number:6} messages: {took_text}", flush=True)
    without, sending = (statistics.median(values) for values in took.values())
    print(f"{without:.1f} s without messages, {sending:.1f} s with {NUM_MESSAGES:,}: ", end="")
    print(f"{100 * (sending / without - 1):+.1f} %, {1000 * (sending - without) / NUM_MESSAGES:.2f} ms each")


def main() -> None:
    if JOB_SPEC_VARIABLE in os.environ:
        load_machine(LoadSpec.model_validate_json(os.environ[JOB_SPEC_VARIABLE]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a step without messages")
    options = parser.parse_args()
    messages(options.rounds, options.seconds)


if __name__ == "__main__":
    main()
