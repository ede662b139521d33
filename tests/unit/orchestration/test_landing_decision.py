"""The landing sensor's decision, tick by tick (cases C04 and C07)."""

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from cifar_assets.dataset.landing import LandingScan
from cifar_assets.object_store import ObjectInfo
from cifar_assets.sensors import MAX_ATTEMPTS, Decision, LandingCursor, decide, is_worth_repeating

START = datetime(2026, 1, 1, tzinfo=UTC)


def landed(name: str, *, etag: str = "a", size: int = 10, minutes: int = 0) -> ObjectInfo:
    return ObjectInfo(f"landing/{name}", size, etag, START + timedelta(minutes=minutes))


def tick(
    cursor: LandingCursor, objects: list[ObjectInfo], *, busy: str | None = None, failed: bool = False
) -> Decision:
    ready = tuple(info for info in objects if info.size)
    skipped = {info.key: "empty object" for info in objects if not info.size}
    return decide(cursor, LandingScan(ready, skipped), busy_run_id=busy, repeat_last=failed)


def test_a_burst_gives_one_run_and_arrivals_meanwhile_one_follow_up() -> None:
    batch = [landed(f"{number}.parquet") for number in range(5)]
    first = tick(LandingCursor(), batch)
    assert first.run_key is not None

    busy_once = tick(first.cursor, [*batch, landed("5.parquet")], busy="run-1")
    more = [*batch, *(landed(f"{number}.parquet") for number in (5, 6, 7))]
    busy_twice = tick(busy_once.cursor, more, busy="run-1")
    assert busy_once.run_key is None
    assert busy_twice.run_key is None
    assert "3 new objects wait for run run-1" in busy_twice.reason

    follow_up = tick(busy_twice.cursor, more)
    assert follow_up.run_key not in (None, first.run_key)
    assert tick(follow_up.cursor, more).run_key is None


def test_a_replayed_tick_asks_for_the_same_run() -> None:
    objects = [landed("a.parquet"), landed("b.parquet")]
    assert tick(LandingCursor(), objects).run_key == tick(LandingCursor(), objects[::-1]).run_key


@pytest.mark.parametrize(
    "changed",
    [landed("a.parquet", etag="b"), landed("a.parquet", size=11)],
    ids=["other content", "other size"],
)
def test_an_overwritten_object_is_new_even_with_an_older_time_stamp(changed: ObjectInfo) -> None:
    first = tick(LandingCursor(), [landed("a.parquet", minutes=60)])
    assert tick(first.cursor, [replace(changed, last_modified=START - timedelta(days=1))]).run_key


def test_a_time_stamp_alone_makes_nothing_new() -> None:
    first = tick(LandingCursor(), [landed("a.parquet")])
    assert tick(first.cursor, [landed("a.parquet", minutes=5)]).run_key is None


def test_removed_and_put_back_unchanged_is_not_new() -> None:
    first = tick(LandingCursor(), [landed("a.parquet"), landed("b.parquet")])
    without = tick(first.cursor, [landed("a.parquet")])
    assert without.run_key is None
    assert tick(without.cursor, [landed("a.parquet"), landed("b.parquet")]).run_key is None


def test_a_state_that_returns_later_gets_a_run_of_its_own() -> None:
    """Dagster never runs the same key twice, so the key must differ from the first time."""
    first = tick(LandingCursor(), [landed("a.parquet")])
    second = tick(first.cursor, [landed("b.parquet")])
    third = tick(second.cursor, [landed("a.parquet")])
    assert len({first.run_key, second.run_key, third.run_key}) == 3


def test_what_is_no_data_is_skipped_with_its_reason_and_hides_nothing() -> None:
    marker = landed("folder/", size=0)
    skipped = tick(LandingCursor(), [marker])
    assert skipped.run_key is None
    assert "Skipped 1: empty object" in skipped.reason
    assert tick(skipped.cursor, [marker, landed("a.parquet")]).run_key


def test_an_empty_landing_zone_asks_for_nothing() -> None:
    assert tick(LandingCursor(), []).run_key is None


def test_a_failed_run_is_tried_again_a_bounded_number_of_times() -> None:
    objects = [landed("a.parquet")]
    decision = tick(LandingCursor(), objects)
    keys = {decision.run_key}
    for _ in range(MAX_ATTEMPTS - 1):
        decision = tick(decision.cursor, objects, failed=True)
        keys.add(decision.run_key)
    assert None not in keys
    assert len(keys) == MAX_ATTEMPTS
    assert tick(decision.cursor, objects, failed=True).run_key is None
    assert tick(decision.cursor, [*objects, landed("b.parquet")], failed=True).cursor.attempt == 1


@pytest.mark.parametrize(
    ("fault", "expected"), [("a blocking check", False), ("a crash", True), ("a check that blocks nothing", False)]
)
def test_a_verdict_stands_and_a_crash_is_worth_another_run(fault: str, expected: bool) -> None:
    @dg.asset(check_specs=[dg.AssetCheckSpec("verdict", asset="model", blocking=fault == "a blocking check")])
    def model() -> dg.MaterializeResult:
        if fault == "a crash":
            raise RuntimeError("out of memory")
        return dg.MaterializeResult(check_results=[dg.AssetCheckResult(passed=False)])

    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize([model], instance=instance, raise_on_error=False, tags={"dagster/run_key": "landing-1"})
        assert is_worth_repeating(instance, "landing-1") is expected
        assert not is_worth_repeating(instance, "landing-2")


def test_a_crash_whose_retry_succeeded_is_over() -> None:
    crashes = [True, False]

    @dg.asset
    def model() -> None:
        if crashes.pop(0):
            raise RuntimeError("out of memory")

    with dg.DagsterInstance.ephemeral() as instance:
        for expected in (True, False):
            dg.materialize([model], instance=instance, raise_on_error=False, tags={"dagster/run_key": "landing-1"})
            assert is_worth_repeating(instance, "landing-1") is expected


def test_any_disorder_of_ten_thousand_objects_misses_and_repeats_nothing() -> None:
    objects = [landed(f"{number:05}.png", minutes=number % 7) for number in range(10_000)]
    shuffler = random.Random(0)
    cursor, requests, visible = LandingCursor(), 0, 0
    while visible < len(objects):
        visible = min(len(objects), visible + shuffler.randrange(1, 4000))
        listing = objects[:visible]
        shuffler.shuffle(listing)
        decision = tick(cursor, listing)
        assert decision.run_key
        cursor, requests = decision.cursor, requests + 1
    assert len(cursor.covered) == 10_000
    assert tick(cursor, objects).run_key is None
    assert requests > 1


def test_the_cursor_survives_its_own_json() -> None:
    cursor = tick(LandingCursor(), [landed("a.parquet")]).cursor
    assert LandingCursor.model_validate_json(cursor.model_dump_json()) == cursor
