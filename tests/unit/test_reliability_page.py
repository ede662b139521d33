"""docs/reliability.md names tests: each of them exists."""

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
NAMED = re.compile(r"(tests/[\w/]+\.py)|::(\w+)")
"""A file, or a test in the file that was named last."""


@cache
def source(path: str) -> str:
    return (ROOT / path).read_text()


def test_every_test_on_the_page_exists() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert sum("tests/" in row for row in rows) > 100
    missing = []
    for row in rows:
        path = ""
        for file, name in NAMED.findall(row):
            if file:
                path = file
                if not (ROOT / path).is_file():
                    missing.append(path)
            elif path not in missing and not re.search(rf"(def|class) {name}\b", source(path)):
                missing.append(f"{path}::{name}")
    assert not missing
