"""The bill of materials: valid CycloneDX, complete, and the same each time."""

import importlib.metadata
import json

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from cifar_assets.training.package import readable_json
from cifar_assets.training.sbom import build_sbom


def test_it_is_valid_and_names_every_package_once() -> None:
    document = readable_json(build_sbom("animals", "a" * 64))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(document.decode()) is None
    assert json.loads(document)["metadata"]["component"]["name"] == "animals"
    python, *packages = json.loads(document)["components"]
    assert python["type"] == "platform"
    installed = {
        name.lower().replace("_", "-").replace(".", "-") for name in importlib.metadata.packages_distributions()
    }
    assert "torch" in installed
    names = [each["name"] for each in packages]
    assert names == sorted(set(names))
    for each in packages:
        assert PackageURL.from_string(each["purl"])[:4] == ("pypi", None, each["name"], each["version"])
    versions = {each["name"]: each["version"] for each in packages}
    for name in ("torch", "numpy", "onnx", "prometheus-client"):
        assert versions[name] == importlib.metadata.version(name)
    assert readable_json(build_sbom("animals", "a" * 64)) == document
