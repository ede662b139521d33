"""The manifest of a version of data or of a model, named by the sha256 of its canonical JSON."""

from typing import Self

from pydantic import BaseModel, ConfigDict

from resources.digests import canonical_json, sha256_bytes
from resources.errors import DataError, ObjectNotFoundError
from resources.object_store import ObjectStore


class Manifest(BaseModel):
    """The contents of a version. The sha256 of its canonical JSON is the version's digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def digest(self) -> str:
        return sha256_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    def write(self, store: ObjectStore, key: str) -> None:
        """Publish the version, which does not exist without its manifest."""
        store.write(key, self.to_bytes())

    @classmethod
    def read(cls, store: ObjectStore, key: str, digest: str, missing: str) -> Self:
        """The manifest with this digest.

        ObjectNotFoundError with the text `missing` if there is none, IntegrityError if it was changed, DataError for an
        unknown kind.
        """
        try:
            return cls.model_validate_json(store.read_verified(key, digest))
        except ObjectNotFoundError as error:
            raise ObjectNotFoundError(missing) from error
        except ValueError as error:
            raise DataError(f"{store.uri(key)} is not a manifest of this kind ({cls.__name__}): {error}") from error
