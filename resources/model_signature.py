"""Signatures of model packages in the format of OpenSSF's model-signing, made and verified with P-256 keys.

A signature is a Sigstore bundle with an in-toto statement that lists the sha256 of every file. The command
`model_signing` accepts signatures of this module, and this module those of `model_signing sign key`. The library itself
is not used: it would add 20 packages and 50 MB to the server's image, whereas minio already requires pycryptodome.
"""

import base64
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from resources.digests import canonical_json, sha256_bytes, sha256_stream
from resources.errors import ConfigError, IntegrityError, ObjectNotFoundError
from resources.object_store import ObjectStore

if TYPE_CHECKING:
    from Crypto.PublicKey.ECC import EccKey

SIGNATURE_FILE = "model.sig"
SIGNING_KEY_VARIABLE = "MODEL_SIGNING_KEY"
PUBLIC_KEY_VARIABLE = "MODEL_PUBLIC_KEY"

_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_SERIALIZATION = {"method": "files", "hash_type": "sha256"}
_PEM = re.compile(r"-----BEGIN ((?:EC )?PRIVATE KEY|PUBLIC KEY)-----.+?-----END \1-----", re.DOTALL)


def signing_key_from(environment: Mapping[str, str]) -> str | None:
    """The private key that MODEL_SIGNING_KEY holds or names, in PEM, or None.

    Raises ConfigError for anything else, and if MODEL_PUBLIC_KEY does not accept it. No message contains the value.
    """
    value, public = environment.get(SIGNING_KEY_VARIABLE), environment.get(PUBLIC_KEY_VARIABLE)
    if not value:
        return None
    key = _load(value, SIGNING_KEY_VARIABLE)[0]
    if public and _hint(key) not in map(_hint, _load(public, PUBLIC_KEY_VARIABLE)):
        raise ConfigError(
            f"{SIGNING_KEY_VARIABLE} does not belong to {PUBLIC_KEY_VARIABLE}, so the model would be refused. Set the "
            "two keys of one pair, or add the new public key to the earlier ones."
        )
    return str(key.export_key(format="PEM"))


def public_key_of(private_key: str) -> str:
    """The public key that belongs to a private one, both in PEM."""
    return _pem(_load(private_key, SIGNING_KEY_VARIABLE)[0])


def read_public_keys(value: str) -> str:
    """Public keys in PEM, from such a text or the path of a file. Raises ConfigError for anything else."""
    return "".join(map(_pem, _load(value, PUBLIC_KEY_VARIABLE)))


def sign(package_name: str, files: Mapping[str, bytes], unsigned: Collection[str], private_key: str) -> bytes:
    """The signature of a package with these files, of which the `unsigned` ones may change."""
    from Crypto.Hash import SHA256
    from Crypto.Signature import DSS

    digests = {name: sha256_bytes(files[name]) for name in sorted(set(files) - set(unsigned))}
    total = sha256_bytes(b"".join(map(bytes.fromhex, digests.values())))
    ignored = [SIGNATURE_FILE, *unsigned]
    serialization = {**_SERIALIZATION, "allow_symlinks": False, "ignore_paths": ignored}
    resources = [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in digests.items()]
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": package_name, "digest": {"sha256": total}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {"serialization": serialization, "resources": resources},
    }
    payload = canonical_json(statement)
    key = _load(private_key, SIGNING_KEY_VARIABLE)[0]
    signature = DSS.new(key, "deterministic-rfc6979", encoding="der").sign(SHA256.new(_pre_authentication(payload)))
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": _hint(key)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return canonical_json(bundle)


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
            predicate = statement["predicate"]
            is_usual = _SERIALIZATION.items() <= predicate["serialization"].items()
            if statement["predicateType"] != _PREDICATE_TYPE or not is_usual:
                raise ValueError("it is of another kind")
            return {resource["name"]: resource["digest"] for resource in predicate["resources"]}
    except ObjectNotFoundError as error:
        raise IntegrityError(
            f"{package.uri()} has no {SIGNATURE_FILE}, but {PUBLIC_KEY_VARIABLE} is set, so only signed models are "
            f"accepted. Set {SIGNING_KEY_VARIABLE} for the trainer and train the model again."
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
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

    private, keys, reason = variable == SIGNING_KEY_VARIABLE, [], ""
    try:
        text = value if "-----BEGIN" in value else Path(value).read_text()
        keys = [ECC.import_key(match[0]) for match in _PEM.finditer(text)]
    except OSError as error:
        reason = f" ({error.strerror})"  # the whole message could contain the key
    except ValueError:
        pass
    if not keys or any(key.curve != "NIST P-256" or key.has_private() != private for key in keys):
        raise ConfigError(
            f"{variable}: expected an unencrypted {'private' if private else 'public'} P-256 key in PEM, or the path "
            f"of a file with one{reason}. docs/signing.md shows how to make a pair."
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
