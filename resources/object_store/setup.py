"""Buckets, users and policies of the platform's object store: `python -m resources.object_store.setup FOLDER`.

The folder has one file per role with its user's secret key, like a mounted Secret. Running it again updates keys and
policies. The AWS_... variables name MinIO and its root user. Other servers have no such interface for users: without
FOLDER, only the buckets are created. SeaweedFS reads the same users and policies from a file, which `--seaweedfs FILE`
writes without connecting to a server.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minio import MinioAdmin
from minio.credentials.providers import StaticProvider

from resources.errors import ConfigError, ExplainedError
from resources.object_store import (
    DATA_BUCKETS,
    LOGS_BUCKET,
    MLFLOW_BUCKET,
    MODELS_BUCKET,
    PROCESSED_BUCKET,
    RAW_BUCKET,
    TRAFFIC_BUCKET,
)
from resources.object_store.s3 import S3Store
from resources.object_store.s3_settings import S3Connection

ALL_BUCKETS = (*DATA_BUCKETS, TRAFFIC_BUCKET, MLFLOW_BUCKET, LOGS_BUCKET)
_LIST = ("s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads")
_READ = ("s3:GetObject",)
_PUT = ("s3:PutObject",)
_ADD = (*_READ, "s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts")
_CHANGE = (*_ADD, "s3:DeleteObject")
_CHECKPOINTS = f"{MODELS_BUCKET}/checkpoints"
_CHECKPOINTS_OF_DATA_SETS = f"{MODELS_BUCKET}/*/checkpoints"

ROLES: dict[str, dict[str, tuple[str, ...]]] = {
    "dagster": dict.fromkeys((*DATA_BUCKETS, TRAFFIC_BUCKET, LOGS_BUCKET), _CHANGE),
    "trainer": {
        PROCESSED_BUCKET: _READ,
        MODELS_BUCKET: _ADD,
        **dict.fromkeys((_CHECKPOINTS, _CHECKPOINTS_OF_DATA_SETS), _CHANGE),
    },
    "server": {MODELS_BUCKET: _READ, TRAFFIC_BUCKET: _PUT},
    "pipeline": {RAW_BUCKET: _READ, PROCESSED_BUCKET: _READ, MODELS_BUCKET: _ADD, _CHECKPOINTS: _CHANGE},
    "mlflow": {MLFLOW_BUCKET: _CHANGE},
}
"""Allowed actions of each role on the objects of a bucket, or of a prefix in it. A role may list what it reads."""


def user_of(role: str) -> str:
    """The access key of the role's user, and the name of its policy."""
    return f"cifar-{role}"


def policy_of(role: str, bucket_prefix: str = "") -> dict[str, Any]:
    """The role's policy document."""
    places = ROLES[role]
    buckets = sorted({place.partition("/")[0] for place, actions in places.items() if actions != _PUT})
    granted = [(_LIST, buckets), *((actions, [f"{place}/*"]) for place, actions in places.items())]
    statements = [
        {"Effect": "Allow", "Action": list(actions), "Resource": [f"arn:aws:s3:::{bucket_prefix}{it}" for it in to]}
        for actions, to in granted
    ]
    return {"Version": "2012-10-17", "Statement": statements}


def seaweedfs_users(keys: Mapping[str, str], bucket_prefix: str = "") -> dict[str, Any]:
    """SeaweedFS's file of users (option -s3.config): every role's key and policy."""
    policies = [{"name": user_of(role), "content": json.dumps(policy_of(role, bucket_prefix))} for role in ROLES]
    identities = [
        {
            "name": user_of(role),
            "credentials": [{"accessKey": user_of(role), "secretKey": keys[role]}],
            "policyNames": [user_of(role)],
        }
        for role in ROLES
    ]
    return {"identities": identities, "policies": policies}


def main(arguments: list[str] | None = None) -> int:
    """Create what is missing on the server that the AWS_... variables name; set every role's key and policy."""
    parser = argparse.ArgumentParser(prog="python -m resources.object_store.setup", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, help="folder with one file per role that contains its secret key"
    )
    parser.add_argument("--seaweedfs", metavar="FILE", type=Path, help="only write SeaweedFS's file of users")
    parser.add_argument(
        "--policy", metavar="ROLE", choices=ROLES, help="only print the role's rights as a policy of AWS"
    )
    options = parser.parse_args(arguments)
    if options.policy:
        policy = policy_of(options.policy, os.environ.get("CIFAR_BUCKET_PREFIX", ""))
        sys.stdout.write(json.dumps(policy, indent=2) + "\n")
        return 0
    try:
        keys = _keys_in(options.folder) if options.folder else {}
        if options.seaweedfs:
            if not keys:
                parser.error("--seaweedfs needs FOLDER")
            options.seaweedfs.touch(mode=0o600)
            users = seaweedfs_users(keys, os.environ.get("CIFAR_BUCKET_PREFIX", ""))
            options.seaweedfs.write_text(json.dumps(users))
            return 0
        connection = S3Connection.from_environment()
        prefix = connection.bucket_prefix
        S3Store(connection).ensure_buckets(prefix + name for name in ALL_BUCKETS)
        if keys:
            _set_users(connection, keys)
    except ExplainedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _keys_in(folder: Path) -> dict[str, str]:
    if missing := [role for role in ROLES if not (folder / role).is_file()]:
        raise ConfigError(f"{folder} has no file {', '.join(missing)}: each contains the secret key of a role's user.")
    return {role: (folder / role).read_text().strip() for role in ROLES}


def _set_users(connection: S3Connection, keys: Mapping[str, str]) -> None:
    prefix = connection.bucket_prefix
    admin = MinioAdmin(
        endpoint=connection.host,
        credentials=StaticProvider(connection.access_key, connection.secret_key),
        region=connection.region,
        secure=connection.secure,
        http_client=connection.pool(),
    )
    for role, places in ROLES.items():
        admin.policy_add(user_of(role), policy=policy_of(role, prefix))
        admin.user_add(user_of(role), keys[role])
        admin.policy_set(user_of(role), user=user_of(role))
        sys.stdout.write(f"user {user_of(role)}: {', '.join(prefix + place for place in places)}\n")


if __name__ == "__main__":
    sys.exit(main())
