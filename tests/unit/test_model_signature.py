"""Signatures of packages: made here and by the real library, verified by both, and every way to break one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from Crypto.PublicKey import ECC, RSA

from cifar_assets.gate import judge
from cifar_assets.model_package import (
    CARD_FILE,
    LOG_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    ONNX_FILE,
    PERFORMANCE_FILE,
    SBOM_FILE,
    UNSIGNED_FILES,
    WEIGHTS_FILE,
    read_manifest,
    verify_package,
    write_package,
)
from cifar_assets.serving.classifier import load_classifier
from resources.errors import ConfigError, IntegrityError
from resources.model_signature import PUBLIC_KEY_VARIABLE, SIGNATURE_FILE, SIGNING_KEY_VARIABLE, signing_key_from
from resources.object_store import FolderStore
from tests.unit.serving.tiny_model import store_tiny_model

PRIVATE, OTHER = ECC.generate(curve="P-256"), ECC.generate(curve="P-256")
PUBLIC, OTHERS = (key.public_key().export_key(format="PEM") for key in (PRIVATE, OTHER))
Tampering = Callable[[FolderStore, Path], object]
BESIDE = {CARD_FILE: b"# Card", SBOM_FILE: b"{}", PERFORMANCE_FILE: b"{}", LOG_FILE: b"log"}


def private_pem(key: ECC.EccKey = PRIVATE) -> str:
    return str(key.export_key(format="PEM"))


def store_signed(folder: Path, seed: int = 0, key: ECC.EccKey | None = PRIVATE) -> tuple[FolderStore, str]:
    """A complete package, signed by the key if there is one."""
    models = FolderStore(folder)
    _, digest = store_tiny_model(models, seed)
    package = models.at(digest)
    manifest = read_manifest(package, digest)
    files = {name: package.read(name) for name in manifest.files}
    write_package(models, manifest, {**files, **BESIDE}, key and private_pem(key))
    return package, digest


def reference(command: str, package: FolderStore, key_option: str, key: Path) -> "subprocess.CompletedProcess[str]":
    """Run the reference implementation on a stored package."""
    place = Path(package.uri().removeprefix("file://"))
    options = ["--signature", str(place / SIGNATURE_FILE), key_option, str(key)]
    arguments = [sys.executable, "-m", "model_signing", command, "key", str(place), *options]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def test_the_reference_accepts_our_signature_and_refuses_changes(tmp_path: Path) -> None:
    package, digest = store_signed(tmp_path / "models")
    key = tmp_path / "public.pem"
    key.write_text(PUBLIC)
    verify_package(package, digest, PUBLIC)
    done = reference("verify", package, "--public_key", key)
    assert done.returncode == 0, done.stdout + done.stderr
    package.write(PERFORMANCE_FILE, b"written later")
    assert reference("verify", package, "--public_key", key).returncode == 0
    package.write(CARD_FILE, b"changed")
    assert reference("verify", package, "--public_key", key).returncode != 0


def test_a_signature_of_the_reference_is_accepted(tmp_path: Path) -> None:
    package, digest = store_signed(tmp_path / "models", key=None)
    key = tmp_path / "private.pem"
    key.write_text(private_pem())
    done = reference("sign", package, "--private_key", key)
    assert done.returncode == 0, done.stdout + done.stderr
    verify_package(package, digest, PUBLIC)
    package.write(LOG_FILE, b"changed")  # the reference signs every file
    with pytest.raises(IntegrityError, match=LOG_FILE):
        verify_package(package, digest, PUBLIC)


def _swap_signature(package: FolderStore, folder: Path) -> None:
    package.write(SIGNATURE_FILE, store_signed(folder / "models", seed=1)[0].read(SIGNATURE_FILE))


def _edit_statement(package: FolderStore, folder: Path) -> None:
    bundle = json.loads(package.read(SIGNATURE_FILE))
    other = json.loads(store_signed(folder / "models", seed=1)[0].read(SIGNATURE_FILE))
    bundle["dsseEnvelope"]["payload"] = other["dsseEnvelope"]["payload"]
    package.write(SIGNATURE_FILE, json.dumps(bundle).encode())


def _pretend_another_key(package: FolderStore, folder: Path) -> None:
    mine = json.loads(package.read(SIGNATURE_FILE))
    forged = json.loads(store_signed(folder / "forged", key=OTHER)[0].read(SIGNATURE_FILE))
    forged["verificationMaterial"] = mine["verificationMaterial"]
    package.write(SIGNATURE_FILE, json.dumps(forged).encode())


def _changed(name: str) -> Tampering:
    return lambda package, _: package.write(name, b"changed")


def _truncated(name: str) -> Tampering:
    return lambda package, _: package.write(name, package.read(name)[:-1])


def _deleted(name: str) -> Tampering:
    return lambda package, _: package.delete(name)


COVERED = (WEIGHTS_FILE, ONNX_FILE, METRICS_FILE, MANIFEST_FILE, CARD_FILE, SBOM_FILE, SIGNATURE_FILE)
TAMPERED: dict[str, Tampering] = {
    **{f"changed {name}": _changed(name) for name in COVERED},
    **{f"truncated {name}": _truncated(name) for name in COVERED},
    **{f"no {name}": _deleted(name) for name in COVERED if name != MANIFEST_FILE},
    "empty signature": lambda p, _: p.write(SIGNATURE_FILE, b""),
    "a list as signature": lambda p, _: p.write(SIGNATURE_FILE, b"[]"),
    "nested signature": lambda p, _: p.write(SIGNATURE_FILE, b"[" * 100_000),
    "added file": lambda p, _: p.write("model.pkl", b"x"),
    "added file in a folder": lambda p, _: p.write("extra/model.onnx", b"x"),
    "signature of another package": _swap_signature,
    "statement of another package": _edit_statement,
    "signed by another key": lambda p, folder: p.write(
        SIGNATURE_FILE, store_signed(folder / "forged", key=OTHER)[0].read(SIGNATURE_FILE)
    ),
    "signed by another key in our name": _pretend_another_key,
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_package_is_refused_by_gate_and_server(how: str, tmp_path: Path) -> None:
    package, digest = store_signed(tmp_path / "models")
    models = FolderStore(tmp_path / "models")
    judge(models, digest, 0.5, PUBLIC)
    load_classifier(package.uri(), digest, public_key=PUBLIC, num_threads=1, batch_images=1)
    TAMPERED[how](package, tmp_path)
    for check in (
        lambda: judge(models, digest, 0.5, PUBLIC),
        lambda: load_classifier(package.uri(), digest, public_key=PUBLIC, num_threads=1, batch_images=1),
    ):
        with pytest.raises(IntegrityError) as caught:
            check()
        assert package.uri() in str(caught.value)
        assert any(word in str(caught.value).lower() for word in ("restore", "train the model again"))


def test_another_signed_package_under_this_digest_is_refused(tmp_path: Path) -> None:
    (_, digest), (other, _) = (store_signed(tmp_path / "models", seed) for seed in (0, 1))
    shutil.copytree(other.uri().removeprefix("file://"), tmp_path / "models" / digest, dirs_exist_ok=True)
    with pytest.raises(IntegrityError, match=f"is not of model {digest}"):
        verify_package(FolderStore(tmp_path / "models" / digest), digest, PUBLIC)


def test_messages_say_what_is_wrong(tmp_path: Path) -> None:
    package, digest = store_signed(tmp_path / "models", key=None)
    with pytest.raises(IntegrityError, match=rf"has no {SIGNATURE_FILE}, but MODEL_PUBLIC_KEY is set"):
        verify_package(package, digest, PUBLIC)
    package, digest = store_signed(tmp_path / "models")
    with pytest.raises(IntegrityError, match=r"is by the key [0-9a-f]{12}, but MODEL_PUBLIC_KEY has [0-9a-f]{12}\."):
        verify_package(package, digest, OTHERS)
    package.write("model.pkl", b"x")
    with pytest.raises(IntegrityError, match=r"no file missing, model\.pkl added"):
        verify_package(package, digest, PUBLIC)


def test_old_and_new_key_are_accepted_together(tmp_path: Path) -> None:
    for seed, key in enumerate((PRIVATE, OTHER)):
        verify_package(*store_signed(tmp_path / "models", seed, key), f"{PUBLIC}\n{OTHERS}")


def test_the_digest_is_the_same_with_and_without_a_signature(tmp_path: Path) -> None:
    digests = {store_signed(tmp_path / str(number), key=key)[1] for number, key in enumerate((None, PRIVATE, OTHER))}
    assert len(digests) == 1


def test_training_again_signs_what_was_not_signed_and_keeps_what_was(tmp_path: Path) -> None:
    package, digest = store_signed(tmp_path, key=None)
    store_signed(tmp_path)
    verify_package(package, digest, PUBLIC)
    package.write(LOG_FILE, b"of the first training")
    signature = package.read(SIGNATURE_FILE)
    store_signed(tmp_path)
    assert (package.read(SIGNATURE_FILE), package.read(LOG_FILE)) == (signature, b"of the first training")
    package.write(CARD_FILE, b"tampered")
    store_signed(tmp_path)
    verify_package(package, digest, PUBLIC)
    assert package.read(CARD_FILE) == BESIDE[CARD_FILE]
    store_signed(tmp_path, key=OTHER)
    verify_package(package, digest, OTHERS)
    assert set(UNSIGNED_FILES) < set(BESIDE)


OPENSSL = {
    "PKCS#8": ["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
    "SEC 1": ["ecparam", "-name", "prime256v1", "-genkey"],
}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
@pytest.mark.parametrize("form", OPENSSL)
def test_keys_of_openssl_are_read_from_a_file_or_the_variable(form: str, tmp_path: Path) -> None:
    made = subprocess.run(["openssl", *OPENSSL[form]], capture_output=True, text=True, check=True).stdout
    path, public = tmp_path / "private.pem", tmp_path / "public.pem"
    path.write_text(made)
    subprocess.run(["openssl", "ec", "-in", path, "-pubout", "-out", public], capture_output=True, check=True)
    environment = {SIGNING_KEY_VARIABLE: str(path), PUBLIC_KEY_VARIABLE: str(public)}
    assert signing_key_from(environment) == signing_key_from({SIGNING_KEY_VARIABLE: made})
    assert signing_key_from({SIGNING_KEY_VARIABLE: "", PUBLIC_KEY_VARIABLE: ""}) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hush-0815", "path of a file"),
        (private_pem().replace("\n", " ")[:60], "unencrypted private P-256 key"),
        (private_pem()[:100] + "hush-0815" + private_pem()[109:], "unencrypted private P-256 key"),
        (str(PRIVATE.export_key(format="PEM", passphrase="x", protection="PBKDF2WithHMAC-SHA1AndAES128-CBC")), "unenc"),
        (str(ECC.generate(curve="P-384").export_key(format="PEM")), "P-256"),
        (RSA.generate(1024).export_key(pkcs=8).decode(), "P-256"),
        (PUBLIC, "unencrypted private P-256 key"),
        (private_pem(OTHER), "does not belong to MODEL_PUBLIC_KEY"),
    ],
    ids=["neither", "cut", "garbled", "encrypted", "P-384", "RSA", "public", "another pair"],
)
def test_a_wrong_private_key_is_refused_and_not_shown(value: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        signing_key_from({SIGNING_KEY_VARIABLE: value, PUBLIC_KEY_VARIABLE: PUBLIC})
    assert SIGNING_KEY_VARIABLE in str(caught.value)
    lines = value.splitlines()
    assert not any(line in repr(caught.value) for line in lines[1:-1] or lines)
