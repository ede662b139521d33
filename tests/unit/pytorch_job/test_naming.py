"""Names are valid for every object that is derived from them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.kubernetes.errors import SettingsError
from resources.kubernetes.naming import check_name, derive_name
from resources.pytorch_job.client import PyTorchJob

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
RUN = "f81d4fae-7dec-11d0-a765-00a0c91e6bf6"


def make(prefix: str, step: str = "cifar10__trained_model", attempt: int = 0) -> str:
    return PyTorchJob.name_for(prefix, run_id=RUN, step_key=step, attempt=attempt)


@pytest.mark.parametrize(
    "prefix", ["a" * 70, "Cifar10_Training.v2", "ends-with-", "3d-net", "", "---", "ümlaut", "a" * 40 + "-" * 30]
)
def test_name_and_all_that_is_derived_from_it_are_dns_labels(prefix: str) -> None:
    name = make(prefix)
    for derived in (name, f"{name}-master-0", f"{name}-worker-99", f"{name}-worker-9998"):
        assert DNS_1035.fullmatch(derived), derived
        assert len(derived) <= 63
    check_name("PyTorchJob", name, f"{name}-worker-9999")


@given(st.text(max_size=90), st.text(max_size=90), st.integers(0, 9))
def test_any_text_gives_a_valid_name(prefix: str, step: str, attempt: int) -> None:
    name = make(prefix, step, attempt)
    assert DNS_1035.fullmatch(f"{name}-worker-9999")
    assert len(f"{name}-worker-9999") <= 63


def test_same_identity_gives_same_name_and_each_part_matters() -> None:
    names = {make("train"), make("train", step="other"), make("train", attempt=1), make("trained")}
    assert len(names) == 4
    assert make("train") == make("train")
    assert PyTorchJob.name_for("train", run_id="other-run", step_key="s", attempt=0) != make("train", step="s")


def test_prefixes_that_are_equal_where_they_are_cut_give_different_names() -> None:
    assert make("a" * 60 + "one") != make("a" * 60 + "two")


def test_name_shows_prefix_and_run() -> None:
    assert make("cifar10-training").startswith("cifar10-training-f81d4fae-")


def test_other_names_follow_the_same_rule() -> None:
    name = derive_name("Inference Service", "digest", reserve=20)
    assert DNS_1035.fullmatch(name)
    assert len(name) <= 43


@pytest.mark.parametrize("name", ["Upper", "under_score", "3d", "ends-", "", "dotted.name", "-start"])
def test_explicit_name_that_breaks_the_rule_is_refused_by_the_rule(name: str) -> None:
    with pytest.raises(SettingsError, match="DNS-1035"):
        check_name("PyTorchJob", name)


def test_explicit_name_whose_worker_would_be_too_long_is_refused() -> None:
    name = "a" * 54
    check_name("PyTorchJob", name)
    check_name("PyTorchJob", name, f"{name}-worker-9")
    with pytest.raises(SettingsError, match=r"-worker-10.*64 characters.*Shorten it by 1"):
        check_name("PyTorchJob", name, f"{name}-worker-10")
