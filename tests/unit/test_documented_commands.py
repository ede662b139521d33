"""Every command line that the README and docs/ print: it parses, and what it names exists."""

import argparse
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import dagster as dg
import pytest
from dagster._cli import create_dagster_cli
from dagster_dg_cli.cli import create_dg_cli

from cifar_assets.definitions import defs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("dagster", "dg", "python", "make", "uv", "pytest", "kubectl", "helm")
OUR_FILES = ("cifar_assets/", "docs/", "images/", "k8s/", "resources/", "tests/")
PLACEHOLDER = re.compile(r"[A-Z]+\.yaml")
"""A file that the reader has to provide."""


def is_command(text: str) -> bool:
    return re.match(rf"(\w+=\S* )*({'|'.join(PROGRAMS)}) ", text) is not None


def commands_in(text: str) -> Iterator[str]:
    """Command lines of code blocks, with continuation lines joined, and of inline code."""
    fenced = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in [*fenced, *re.findall(r"(?:^    .*\n)+", prose, re.MULTILINE)]:
        lines = iter(block.splitlines())
        for line in lines:
            command = line.strip().removeprefix("$ ")
            if is_command(command):
                while not is_whole(command):
                    command += f"\n{next(lines)}"
                yield command
    for span in re.findall(r"`([^`]+)`", prose):
        if is_command(span):
            yield " ".join(span.split())


def is_whole(command: str) -> bool:
    try:
        return bool(shlex.split(command))
    except ValueError:
        return False


def words_of(command: str) -> list[str]:
    """The program and its arguments, without preceding variables and following shell operators."""
    words = shlex.split(re.sub(r"<[a-z ]+>", "value", command.replace("\\\n", "")), comments=True)
    while "=" in words[0]:
        words.pop(0)
    end = next((i for i, word in enumerate(words) if word in (">", "|", "&", "&&", ";")), len(words))
    return words[:end]


COMMANDS = sorted({(page.name, command) for page in PAGES for command in commands_in(page.read_text())})


def starting_with(program: str) -> list[Any]:
    return [
        pytest.param(words, id=f"{page}: {' '.join(words)[:90]}")
        for page, command in COMMANDS
        if (words := words_of(command))[0] == program
    ]


def test_commands_are_found() -> None:
    assert all(starting_with(program) for program in ("dg", "python", "make"))
    assert not starting_with("uv"), "the docs print commands as an activated environment takes them, without `uv run`"


def test_files_of_ours_exist() -> None:
    for page, command in COMMANDS:
        for word in shlex.split(command.replace("\\\n", "")):
            if word.startswith(OUR_FILES):
                assert (ROOT / word).exists(), f"{page}: {command}"


@pytest.mark.parametrize("words", [*starting_with("dagster"), *starting_with("dg")])
def test_dagster_would_run_it(words: Sequence[str]) -> None:
    if words[:3] == ["dg", "scaffold", "defs"]:
        pytest.skip("its subcommands are the components of a project: tests/unit/examples runs it")
    options = parsed_by(create_dagster_cli() if words[0] == "dagster" else create_dg_cli(), words[1:])
    repository = defs.get_repository_def()
    if words[0] == "dagster" and "module_name" in options:
        assert options["module_name"] == "cifar_assets.definitions"
    job = None
    if selection := options.get("select") or options.get("assets"):
        keys = dg.AssetSelection.from_coercible(selection.split(",")).resolve(repository.asset_graph)
        assert keys
        job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection=set(keys))
    if name := options.get("job_name") or options.get("job"):
        job = repository.get_job(name.removeprefix("animals_"))  # your_own_images.md declares this data set
    if options.get("config_json"):
        assert job is not None
        dg.validate_run_config(job, json.loads(options["config_json"]))


def parsed_by(command: click.Command, words: Sequence[str]) -> dict[str, Any]:
    """Options by their name in the code. Raises click's error for an unknown one."""
    rest = list(words)
    while isinstance(command, click.Group):
        _, found, rest = command.resolve_command(click.Context(command), rest)
        assert found is not None
        command = found
    return command.make_context(command.name, rest).params


@pytest.mark.parametrize("words", starting_with("python"))
def test_python_would_run_it(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[1] == "-m":
        name, arguments = words[2], words[3:]
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations:
            found = importlib.util.find_spec(f"{name}.__main__")
        assert found is not None, f"there is no module {name} that can be run"
        assert found.origin is not None
        source = Path(found.origin)
    else:
        arguments = words[2:]
        source = ROOT / words[1]
    takes_arguments = re.search(r"\b(argparse|parse_settings|print_manifest)\b", source.read_text())
    assert takes_arguments or not arguments
    if not arguments or any(PLACEHOLDER.fullmatch(argument) for argument in arguments):
        return

    parse = argparse.ArgumentParser.parse_args

    def parse_only(*given: Any, **named: Any) -> None:
        parse(*given, **named)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [str(source), *arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(source), run_name="__main__")
    assert not end.value.code, f"exit code {end.value.code}"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("words", starting_with("make"))
def test_make_has_the_target(words: Sequence[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(
        ["make", "--dry-run", *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("arguments", "environment", "source"),
    [
        ([], {}, "synthetic"),
        ([], {"SOURCE": "other"}, "synthetic"),
        ([], {"CIFAR10_SOURCE": "download", "SOURCE": "other"}, "download"),
        (["SOURCE=photos"], {"CIFAR10_SOURCE": "download"}, "photos"),
        (["CIFAR10_SOURCE=photos"], {"CIFAR10_SOURCE": "download"}, "photos"),
    ],
)
def test_make_takes_the_source_of_the_images(
    arguments: Sequence[str], environment: dict[str, str], source: str
) -> None:
    environment = {"PATH": os.environ["PATH"], **environment}
    command = ["make", "--eval", 'show: ; @echo "$$CIFAR10_SOURCE"', "show", *arguments]
    assert subprocess.check_output(command, cwd=ROOT, env=environment, text=True).strip() == source


def test_jobs_assets_and_checks_that_sentences_name_exist() -> None:
    graph = defs.resolve_asset_graph()
    known = {
        "job": {job.name for job in defs.get_repository_def().get_all_jobs()},
        "asset": {key.path[-1] for key in graph.get_all_asset_keys()},
        "check": {key.name for key in graph.asset_check_keys},
    }
    for page in PAGES:
        for kind, name in re.findall(r"\b(job|asset|check) `([\w/]+)`", page.read_text()):
            assert name.rpartition("/")[2] in known[kind], f"{page.name}: {kind} {name}"
