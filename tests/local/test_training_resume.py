"""Trainings that are killed or stopped, and started again with the same spec."""

import os
import random
import signal
import socket
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from resources.trainer.contract import EXIT_RESUME
from tests.fixtures.pausing import pausing
from tests.unit.training.jobs import Workplace, fork_trainer, json_file, run_forked, start_trainer, wait_for_line

pytestmark = pytest.mark.timeout(1800)

NUM_KILLS = 20
LONG_RECIPE = {"epochs": 40}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace.make(tmp_path)


def wait_for_checkpoints(process: ForkServerProcess, place: Workplace, num_new: int) -> None:
    """Wait for this number of new checkpoints or the job's end: with a delay alone, all kills may come too early."""
    before = {path.name for path in place.checkpoints("killed")}
    seen: set[str] = set()
    while process.exitcode is None and len(seen) < num_new:
        process.join(0.005)
        seen |= {path.name for path in place.checkpoints("killed")} - before


def test_twenty_random_kills_do_not_change_the_weights(place: Workplace) -> None:
    """SIGKILL at times from before the first step to the writing of the model; then the same spec runs again."""
    execution = {"threads": 1, "device": "cpu", "checkpoint_every_steps": 2}
    undisturbed = place.spec("undisturbed", recipe_fields=LONG_RECIPE, execution=execution)
    spec = place.spec("killed", recipe_fields=LONG_RECIPE, execution=execution)
    fork_trainer(undisturbed).join()  # a first start is slower; the second one is timed
    before = time.monotonic()
    again = fork_trainer(place.spec("again", recipe_fields=LONG_RECIPE, execution=execution))
    again.join()
    seconds = time.monotonic() - before
    assert again.exitcode == 0

    choice = random.Random(20)
    resumed_steps = set()
    kills = 0
    while kills < NUM_KILLS:
        process = fork_trainer(spec)
        wait_for_checkpoints(process, place, choice.randrange(3))
        process.join(choice.uniform(0, 0.1 * seconds))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            resumed_steps |= {path.name for path in place.checkpoints("killed")}
        else:
            # the job ended before the kill: start over
            assert process.exitcode == 0
    last = fork_trainer(spec)
    last.join()
    assert last.exitcode == 0
    assert resumed_steps
    assert set(place.published("killed")) == set(place.published("undisturbed")) == set(place.published("again"))
    assert place.checkpoints("killed") == []
    assert len(list((place.folder / "killed").rglob(".writing-*"))) <= kills  # which prune removes a day later


def test_sigterm_saves_a_checkpoint_and_reports_unfinished_work(place: Workplace) -> None:
    spec = place.spec("stopped", execution={"threads": 1, "checkpoint_every_steps": 0})
    process = start_trainer(spec, env=pausing(place.folder / "pause"))
    wait_for_line(process, "Epoch 1/")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == EXIT_RESUME, output
    assert "start the same spec again" in output
    assert place.published("stopped") == {}
    step = int(place.checkpoints("stopped")[-1].name.split("-")[1])
    assert f"Stopped after step {step} of" in output


def test_unreachable_store_is_a_transient_failure(place: Workplace) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        store = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        code, output = run_forked(place.spec(output_uri="s3://models"), store)
    assert code == EXIT_RESUME, output
    assert "no response from an S3 server in 5 attempts" in output


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_training_continues_where_it_was(place: Workplace, stop: signal.Signals) -> None:
    spec = place.spec("stopped")
    process = fork_trainer(spec, pausing(place.folder / "pause"))
    while not place.checkpoints("stopped"):
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, stop)
    process.join()
    assert process.exitcode == EXIT_RESUME
    step = int(place.checkpoints("stopped")[-1].name.split("-")[1])

    for job in (spec, place.spec("undisturbed")):
        process = fork_trainer(job)
        process.join()
        assert process.exitcode == 0
    digest, metrics = place.only_model("stopped")
    assert digest == place.only_model("undisturbed")[0]
    assert len(metrics["history"]) == 3
    performance = json_file(place.models("stopped"), f"{digest}/performance.json")
    assert performance["resumed_from_step"] == step
    assert "Continuing from the checkpoint" in place.models("stopped").read(f"{digest}/training.log").decode()


def test_damaged_newest_checkpoint_loses_only_its_steps(place: Workplace) -> None:
    execution = {"threads": 1, "device": "cpu", "checkpoint_every_steps": 2}
    spec = place.spec("damaged", execution=execution)
    process = fork_trainer(spec, pausing(place.folder / "pause"))
    while len(place.checkpoints("damaged")) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    newest = place.checkpoints("damaged")[-1]
    newest.write_bytes(newest.read_bytes()[:-100])

    for job in (spec, place.spec("undisturbed")):
        process = fork_trainer(job)
        process.join()
        assert process.exitcode == 0
    digest = place.only_model("damaged")[0]
    assert digest == place.only_model("undisturbed")[0]
    log = place.models("damaged").read(f"{digest}/training.log").decode()
    assert f"Skipping checkpoint {newest.as_uri()}" in log
