"""For people and for the workflow itself: `train` makes the training step's YAML, `report` says what became of a run.

`train` takes a file that holds `name` and `config` (fields of PyTorchJobConfig).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from resources.argo.client import WorkflowClient
from resources.argo.report import explain
from resources.argo.template import build_train_template, to_yaml
from resources.kubernetes.errors import KubernetesError, SettingsError
from resources.pytorch_job.config import PyTorchJobConfig


def render(path: Path) -> str:
    """YAML of the training's WorkflowTemplate. SettingsError for settings that are not valid."""
    settings: Any = yaml.safe_load(path.read_text())
    if not isinstance(settings, dict) or set(settings) != {"name", "config"}:
        raise SettingsError(f"{path}: expected the keys name and config.")
    try:
        template = build_train_template(settings["name"], PyTorchJobConfig(**settings["config"]))
    except (TypeError, ValidationError) as error:
        raise SettingsError(f"{path}: {error}") from error
    source = f"# Generated from {path.name} by: python -m resources.argo train k8s/argo/{path.name}\n"
    return source + to_yaml(template)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 1 with the reason on stderr."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (KubernetesError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _report(options: argparse.Namespace) -> None:
    client = WorkflowClient.production()
    workflow = client.get(options.namespace, options.workflow)
    if workflow is None:
        text = f"Workflow {options.namespace}/{options.workflow} does not exist (any more)."
    else:
        text = explain(client, workflow)
    sys.stdout.write(f"{text}\n")
    if options.outputs:
        options.outputs.mkdir(parents=True, exist_ok=True)
        Path(options.outputs, "report").write_text(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m resources.argo", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("train", help="print the training step's WorkflowTemplate")
    command.add_argument("settings", type=Path, help="such as k8s/argo/train.settings.yaml")
    command.set_defaults(run=lambda options: sys.stdout.write(render(options.settings)))
    command = commands.add_parser("report", help="say which step of a workflow failed, and why")
    command.add_argument("namespace")
    command.add_argument("workflow")
    command.add_argument("--outputs", type=Path, help="folder that the report is also written to")
    command.set_defaults(run=_report)
    return parser


if __name__ == "__main__":
    sys.exit(main())
