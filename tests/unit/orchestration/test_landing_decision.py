"""The landing sensor's decision, tick by tick."""

import random
from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from cifar_assets.dataset.landing.zone import LandingScan, fingerprint
from cifar_assets.landing_decision import MAX_ATTEMPTS, Decision, LandingCursor, LastRun, Outcome, decide
from resources.object_store import ObjectInfo

START = datetime(2026, 1, 1, tzinfo=UTC)


def landed(name: str, *, etag: str = "a", size: int = 10, minutes: int = 0) -> ObjectInfo:
    return ObjectInfo(f"landing/{name}", size, etag, START + timedelta(minutes=minutes))


def tick(
    cursor: LandingCursor,
    objects: list[ObjectInfo],
    *,
    busy: str | None = None,
    last: Outcome = "succeeded",
    read: Collection[ObjectInfo] | None = None,
) -> Decision:
    """One tick. The last run has read all requested objects, unless `read` says otherwise."""
    ready = tuple(info for info in objects if info.size)
    skipped = {info.key: "empty object" for info in objects if not info.size}
    return decide(
        cursor,
        LandingScan(ready, skipped),
        busy=busy,
        last=LastRun("run-1", last) if cursor.run_key else None,
        read=None if read is None else {fingerprint(info) for info in read},
    )


def test_a_burst_gives_one_run_and_arrivals_meanwhile_one_follow_up() -> None:
    batch = [landed(f"{number}.parquet") for number in range(5)]
    first = tick(LandingCursor(), batch)
    assert first.run_key is not None

    busy_once = tick(first.cursor, [*batch, landed("5.parquet")], busy="run-1")
    more = [*batch, *(landed(f"{number}.parquet") for number in (5, 6, 7))]
    busy_twice = tick(busy_once.cursor, more, busy="run-1")
    assert busy_once.run_key is None
    assert busy_twice.run_key is None
    assert "Waiting for run-1 to end: 3 new objects" in busy_twice.reason

    follow_up = tick(busy_twice.cursor, more)
    assert follow_up.run_key not in (None, first.run_key)
    assert tick(follow_up.cursor, more).run_key is None


def test_a_replayed_tick_asks_for_the_same_run() -> None:
    objects = [landed("a.parquet"), landed("b.parquet")]
    cursor = LandingCursor()
    assert tick(cursor, objects).run_key == tick(cursor, objects[::-1]).run_key


@pytest.mark.parametrize(
    "changed",
    [landed("a.parquet", etag="b"), landed("a.parquet", size=11)],
    ids=["other content", "other size"],
)
def test_an_overwritten_object_is_new_even_with_an_older_time_stamp(changed: ObjectInfo) -> None:
    first = tick(LandingCursor(), [landed("a.parquet", minutes=60)])
    assert tick(first.cursor, [replace(changed, last_modified=START - timedelta(days=1))]).run_key


def test_new_time_stamp_alone_is_not_a_change() -> None:
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


def test_objects_that_are_not_data_are_skipped_with_a_reason_and_hide_nothing() -> None:
    marker = landed("folder/", size=0)
    skipped = tick(LandingCursor(), [marker])
    assert skipped.run_key is None
    assert "Skipped 1: empty object" in skipped.reason
    assert tick(skipped.cursor, [marker, landed("a.parquet")]).run_key


def test_an_empty_landing_zone_asks_for_nothing() -> None:
    assert tick(LandingCursor(), []).run_key is None


def test_a_failed_run_is_tried_again_a_bounded_number_of_times_and_then_named() -> None:
    objects = [landed("a.parquet")]
    decision = tick(LandingCursor(), objects)
    keys = {decision.run_key}
    for _ in range(MAX_ATTEMPTS - 1):
        decision = tick(decision.cursor, objects, last="crashed")
        keys.add(decision.run_key)
    assert None not in keys
    assert len(keys) == MAX_ATTEMPTS
    given_up = tick(decision.cursor, objects, last="crashed")
    assert given_up.run_key is None
    assert "Gave up after 3 runs: 1 object (landing/a.parquet), as run run-1 failed" in given_up.reason
    assert "start the job retrain manually or reset this sensor's cursor" in given_up.reason
    assert tick(decision.cursor, [*objects, landed("b.parquet")], last="crashed").cursor.attempt == 1


def test_an_object_that_was_away_while_the_run_read_is_asked_for_again() -> None:
    a, b = landed("a.parquet"), landed("b.parquet")
    first = tick(LandingCursor(), [a, b])
    while_away = tick(first.cursor, [a], read=[a])
    assert while_away.run_key is None
    back = tick(while_away.cursor, [a, b], read=[a])
    assert back.run_key not in (None, first.run_key)
    assert "1 object (landing/b.parquet), as run run-1 did not read them" in back.reason
    assert tick(back.cursor, [a, b], read=[a, b]).run_key is None


def test_a_build_by_hand_that_missed_an_object_is_noticed() -> None:
    a, b = landed("a.parquet"), landed("b.parquet")
    first = tick(LandingCursor(), [a, b])
    assert tick(first.cursor, [a, b], read=[a, b]).run_key is None
    assert tick(first.cursor, [a, b], read=[a]).run_key


def test_an_object_that_no_run_can_read_is_given_up_by_name() -> None:
    objects = [landed("a.parquet"), landed("unreadable.parquet")]
    decision = tick(LandingCursor(), objects)
    for _ in range(MAX_ATTEMPTS - 1):
        decision = tick(decision.cursor, objects, read=objects[:1])
        assert decision.run_key
    given_up = tick(decision.cursor, objects, read=objects[:1])
    assert given_up.run_key is None
    assert "Gave up after 3 runs: 1 object (landing/unreadable.parquet)" in given_up.reason


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ("succeeded", "No new data: run run-1 has already used the 1 object"),
        ("unfinished", "No new data: run run-1 is processing the 1 object"),
        ("canceled", "Run run-1 for the 1 object under landing/ was canceled. To try again, start the job retrain"),
        ("refused", "Run run-1 for the 1 object under landing/ failed a blocking check"),
    ],
)
def test_the_reason_names_the_run_and_what_became_of_the_objects(outcome: Outcome, reason: str) -> None:
    objects = [landed("a.parquet")]
    first = tick(LandingCursor(), objects)
    after = tick(first.cursor, objects, last=outcome)
    assert after.run_key is None
    assert after.reason.startswith(reason)


def test_a_run_that_was_deleted_from_dagster_is_asked_for_again_unless_its_objects_were_read() -> None:
    objects = [landed("a.parquet")]
    cursor = tick(LandingCursor(), objects).cursor
    scan = LandingScan(tuple(objects), {})
    assert decide(cursor, scan).run_key
    assert decide(cursor, scan, read={fingerprint(objects[0])}).run_key is None


def test_missed_objects_wait_while_another_training_runs() -> None:
    objects = [landed("a.parquet")]
    first = tick(LandingCursor(), objects)
    waiting = tick(first.cursor, objects, last="crashed", busy="run run-2 (train, STARTED)")
    assert waiting.run_key is None
    assert "Waiting for run run-2 (train, STARTED) to end: 1 object" in waiting.reason


def test_every_object_is_requested_once_in_any_order() -> None:
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


def test_cursor_survives_a_json_round_trip() -> None:
    cursor = tick(LandingCursor(), [landed("a.parquet")]).cursor
    assert LandingCursor.load(cursor.model_dump_json()) == (cursor, "")


def test_a_cursor_of_the_first_form_is_migrated() -> None:
    """The format from before cursors had a version."""
    objects = [landed("a.parquet")]
    covered = fingerprint(objects[0])
    text = f'{{"covered":["{covered}"],"sequence":4,"attempt":2,"run_key":"landing-4-0123456789ab"}}'
    cursor, note = LandingCursor.load(text)
    assert note == ""
    assert (cursor.version, cursor.covered, cursor.attempt) == (2, [covered], 2)
    assert tick(cursor, objects).run_key is None
    later = tick(cursor, [*objects, landed("b.parquet")])
    assert later.run_key is not None
    assert later.run_key.startswith("landing-5-")


@pytest.mark.parametrize("text", ["{", "7", '{"version": 3}', '{"covered": 1}'])
def test_a_cursor_that_cannot_be_read_is_started_again_with_a_note(text: str) -> None:
    cursor, note = LandingCursor.load(text)
    assert cursor.covered == []
    assert text in note
