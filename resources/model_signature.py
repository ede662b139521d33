"""Signatures of model packages in the format of OpenSSF's model-signing, made and verified with P-256 keys.

A signature is a Sigstore bundle with an in-toto statement that lists the sha256 of every file. The command
`model_signing` accepts signatures of this module, and this module those of `model_signing sign key`. The library itself
is not used: it would add 20 packages and 50 MB to the server's image, whereas minio already requires pycryptodome.
"""

import base64
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.digests import canonical_json, sha256_bytes, sha256_stream
from resources.errors import ConfigError, IntegrityError, ObjectNotFoundError
from resources.object_store import ObjectStore

if TYPE_CHECKING:
    from Crypto.PublicKey.ECC import EccKey

SIGNATURE_FILE = "model.sig"
SIGNING_KEY_VARIABLE = "MODEL_SIGNING_KEY"
PUBLIC_KEY_VARIABLE = "MODEL_PUBLIC_KEY"

_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_PEM = re.compile(r"-----BEGIN ((?:EC )?PRIVATE KEY|PUBLIC KEY)-----.+?-----END \1-----", re.DOTALL)


def signing_key_from(environment: Mapping[str, str]) -> "EccKey | None":
    """The private key that MODEL_SIGNING_KEY holds or names, or None.

    Raises ConfigError for anything else than one private P-256 key, and if MODEL_PUBLIC_KEY does not belong to it. No
    message contains the value.
    """
    if not (value := environment.get(SIGNING_KEY_VARIABLE)):
        return None
    keys = _load(value, SIGNING_KEY_VARIABLE)
    if len(keys) != 1 or not keys[0].has_private():
        raise ConfigError(f"{SIGNING_KEY_VARIABLE}: expected one private key. docs/signing.md shows how to make it.")
    public = public_keys_from(environment)
    if public and _hint(keys[0]) not in map(_hint, _load(public, PUBLIC_KEY_VARIABLE)):
        raise ConfigError(
            f"{SIGNING_KEY_VARIABLE} does not belong to {PUBLIC_KEY_VARIABLE}, so the gate would refuse the model. Set "
            "the two files of one pair, or add the new public key to the earlier ones."
        )
    return keys[0]


def public_keys_from(environment: Mapping[str, str]) -> str | None:
    """The public keys that MODEL_PUBLIC_KEY holds or names, in PEM, or None. ConfigError as in `read_public_keys`."""
    value = environment.get(PUBLIC_KEY_VARIABLE)
    return read_public_keys(value) if value else None


def read_public_keys(value: str) -> str:
    """Public P-256 keys, one or more, in PEM, from such a text or the path of a file. Raises ConfigError otherwise."""
    keys = _load(value, PUBLIC_KEY_VARIABLE)
    if any(key.has_private() for key in keys):
        raise ConfigError(f"{PUBLIC_KEY_VARIABLE} is a private key: set the public one, and make a new pair.")
    return "".join(map(_pem, keys))


def sign(name: str, files: Mapping[str, bytes], unsigned: Collection[str], key: "EccKey") -> bytes:
    """The signature of a package: its name, its files, and further files that may change without invalidating it."""
    from Crypto.Hash import SHA256
    from Crypto.Signature import DSS

    digests = {name: sha256_bytes(files[name]) for name in sorted(set(files) - set(unsigned))}
    total = hashlib.sha256(b"".join(map(bytes.fromhex, digests.values()))).hexdigest()
    ignored = [SIGNATURE_FILE, *sorted(unsigned)]
    statement = {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": total}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": ignored,
            },
            "resources": [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in digests.items()],
        },
    }
    payload = canonical_json(statement)
    signature = DSS.new(key, "deterministic-rfc6979", encoding="der").sign(SHA256.new(_pre_authentication(payload)))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": _PAYLOAD_TYPE,
        "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
    }
    material = {"publicKey": {"hint": _hint(key)}, "tlogEntries": []}
    return canonical_json({"mediaType": _BUNDLE_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope})


def verify(package: ObjectStore, unsigned: Collection[str], public_keys: str) -> Mapping[str, str]:
    """The sha256 of the package's files by name, after reading all of them.

    Raises IntegrityError unless one of the keys signed exactly these files; only `unsigned` ones may be added.
    """
    signed = _signed_digests(package, public_keys)
    stored = {info.key for info in package.list()}
    missing, added = set(signed) - stored, stored - set(signed) - set(unsigned) - {SIGNATURE_FILE}
    if missing or added:
        raise IntegrityError(
            f"{package.uri()} is not as signed: {', '.join(sorted(missing)) or 'no file'} missing, "
            f"{', '.join(sorted(added)) or 'no file'} added. Restore the package, or train the model again."
        )
    for name, digest in signed.items():
        with package.open(name) as file:
            found = sha256_stream(file)
        if found != digest:
            raise IntegrityError(
                f"{package.uri(name)} is not as signed: expected sha256 {digest}, got {found}. It was changed, or "
                f"{SIGNATURE_FILE} belongs to another model: restore the package, or train the model again."
            )
    return signed


def _signed_digests(package: ObjectStore, public_keys: str) -> dict[str, str]:
    """What the package's signature says, which is authentic."""
    from Crypto.Hash import SHA256
    from Crypto.Signature import DSS

    keys = {_hint(key): key for key in _load(public_keys, PUBLIC_KEY_VARIABLE)}
    try:
        bundle = json.loads(package.read(SIGNATURE_FILE))
        hint = str(bundle["verificationMaterial"]["publicKey"]["hint"])
        if hint in keys:
            payload = base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)
            signature = base64.b64decode(bundle["dsseEnvelope"]["signatures"][0]["sig"], validate=True)
            verifier = DSS.new(keys[hint], "fips-186-3", encoding="der")
            verifier.verify(SHA256.new(_pre_authentication(payload)), signature)
            statement = json.loads(payload)
            expected = (_PREDICATE_TYPE, "files", "sha256")
            serialization = statement["predicate"]["serialization"]
            if (statement["predicateType"], serialization["method"], serialization["hash_type"]) != expected:
                raise ValueError(f"expected a statement of the kinds {expected}")
            return {resource["name"]: resource["digest"] for resource in statement["predicate"]["resources"]}
    except ObjectNotFoundError as error:
        raise IntegrityError(
            f"{package.uri()} has no {SIGNATURE_FILE}, but {PUBLIC_KEY_VARIABLE} is set, so only signed models are "
            f"accepted. Set {SIGNING_KEY_VARIABLE} for the trainer and train the model again."
        ) from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{package.uri(SIGNATURE_FILE)} is not a valid signature: {error}. Restore it, or train the model again."
        ) from error
    raise IntegrityError(
        f"{package.uri(SIGNATURE_FILE)} is by the key {hint[:12]}, but {PUBLIC_KEY_VARIABLE} has "
        f"{', '.join(each[:12] for each in keys)}. If you trust that key, add it to {PUBLIC_KEY_VARIABLE}; otherwise "
        "train the model again."
    )


def _load(value: str, variable: str) -> "list[EccKey]":
    from Crypto.PublicKey import ECC

    try:
        text = value if "-----BEGIN" in value else Path(value).read_text()
        keys: list[Any] = [ECC.import_key(match[0]) for match in _PEM.finditer(text)]
    except (OSError, ValueError) as error:  # neither is shown whole: a message may contain the value
        reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
        keys = []
    else:
        reason = ""
    if not keys or any(key.curve != "NIST P-256" for key in keys):
        raise ConfigError(
            f"{variable}: expected an unencrypted P-256 key in PEM, or the path of a file with one{reason}. "
            "docs/signing.md shows how to make it."
        ) from None
    return keys


def _pem(key: "EccKey") -> str:
    return f"{key.public_key().export_key(format='PEM')}\n"


def _hint(key: "EccKey") -> str:
    """The identifier of a key in signatures."""
    return sha256_bytes(_pem(key).encode())


def _pre_authentication(payload: bytes) -> bytes:
    """The bytes that a DSSE envelope signs (https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md)."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)
