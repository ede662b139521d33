"""What a server process is told, what it loads, and how ports are found taken."""

import json
import socket
import subprocess
import sys

import pytest

from cifar_assets.serving.__main__ import main
from cifar_assets.serving.settings import parse_settings
from resources.errors import ConfigError
from resources.sockets import listen
from resources.trainer.contract import EXIT_BAD_SPEC

REQUIRED = ["--model-uri", "file:///m/", "--model-digest", "abcdef0123456789"]


def test_a_server_listens_on_loopback_by_default() -> None:
    settings = parse_settings(REQUIRED, {})
    assert (settings.host, settings.port, settings.model_version) == ("127.0.0.1", 8080, "abcdef012345")


def test_options_come_from_the_environment_too_and_the_command_line_wins() -> None:
    environment = {
        "CIFAR_SERVING_MODEL_URI": "s3://models/a/",
        "CIFAR_SERVING_MODEL_DIGEST": "aa",
        "CIFAR_SERVING_HOST": "0.0.0.0",
        "CIFAR_SERVING_PORT": "9000",
        "CIFAR_SERVING_DRAIN_DELAY": "5",
        "CIFAR_SERVING_THREADS": "2",
        "PORT": "1",
    }
    settings = parse_settings(["--port", "9001", "--model-version", "3"], environment)
    assert (settings.model_uri, settings.model_digest, settings.model_version) == ("s3://models/a/", "aa", "3")
    assert (settings.host, settings.port, settings.drain_delay, settings.threads) == ("0.0.0.0", 9001, 5, 2)
    assert parse_settings(REQUIRED, {"PORT": "8081"}).port == 8081


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--model-uri"),
        (["--model-uri", "file:///m/"], "--model-digest"),
        ([*REQUIRED, "--port", "70000"], "--port"),
        ([*REQUIRED, "--port", "http"], "--port"),
        ([*REQUIRED, "--threads", "0"], "--threads"),
        ([*REQUIRED, "--linger", "-1"], "--linger"),
        ([*REQUIRED, "--linger", "nan"], "--linger"),
        ([*REQUIRED, "--models", "x"], "--models"),
    ],
)
def test_wrong_options_end_with_a_usage_message(arguments, word, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings(arguments, {})
    assert caught.value.code == EXIT_BAD_SPEC
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("ftp://x/", "expected file:///folder or s3://bucket/prefix"),
        ("file:///no/such/model/", "There is no model in file:///no/such/model/"),
    ],
)
def test_permanent_errors_exit_with_one_line_and_their_own_code(uri, words, caplog, monkeypatch) -> None:
    monkeypatch.setattr("cifar_assets.serving.__main__.configure_logging", lambda: None)
    assert main(["--model-uri", uri, "--model-digest", "0" * 64, "--port", "0"]) == EXIT_BAD_SPEC
    (record,) = [record for record in caplog.records if record.name == "cifar_assets.serving"]
    assert words in record.message
    assert record.exc_info is None


def run_code(code: str) -> str:
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return output.stdout.splitlines()[-1]


def test_the_server_loads_only_what_it_needs() -> None:
    """It stays small enough for a pod of 512 MiB."""
    modules, peak_kilobytes = json.loads(
        run_code(
            "import json, pathlib, re, sys\n"
            "import cifar_assets.serving.server\n"
            "status = pathlib.Path('/proc/self/status').read_text()\n"
            "print(json.dumps([sorted(sys.modules), int(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1])]))"
        )
    )
    unwanted = {"torch", "torchvision", "dagster", "pandas", "kubernetes", "mlflow", "pyarrow", "matplotlib", "kserve"}
    assert unwanted.isdisjoint(modules)
    assert {"fastapi", "uvicorn", "minio"}.isdisjoint(modules)
    assert peak_kilobytes < 120 * 1024


def test_the_deployer_imports_nothing_of_the_server() -> None:
    modules = json.loads(
        run_code("import json, sys\nimport resources.inference_service.local\nprint(json.dumps(sorted(sys.modules)))")
    )
    unwanted = {"onnxruntime", "uvloop", "httptools", "torch", "mlflow", "kubernetes"}
    assert unwanted.isdisjoint(modules)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::"])
def test_any_address_of_this_machine_can_be_listened_on(host) -> None:
    with (
        listen(host, 0) as listener,
        socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=60),
    ):
        pass


def test_a_taken_port_and_an_unknown_host_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: another process is listening there"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="Cannot listen on no-such-host"):
        listen("no-such-host.invalid", 0)
