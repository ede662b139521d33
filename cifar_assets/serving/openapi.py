"""The addresses and bodies of the server as an OpenAPI document."""

from collections.abc import Iterable
from typing import Any

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE, MODEL_INPUT
from cifar_assets.serving.messages import JSON_TYPE, ModelIdentity
from cifar_assets.serving.multipart import PART_NAME
from cifar_assets.serving.v2 import DATATYPE, OUTPUT_NAMES

_REFUSALS = ("400", "404", "405", "408", "413", "415", "429", "431", "500", "503")
_TEXT, _NUMBER = {"type": "string"}, {"type": "number"}


def describe(identity: ModelIdentity, gets: Iterable[str], posts: Iterable[str]) -> dict[str, Any]:
    """The document for these addresses. Name and version of the model are parameters, as in the protocols."""
    operations = [("get", path, {"summary": f"GET {path}", **_answers({})}) for path in gets]
    operations += [("post", path, _PREDICT if path.endswith(":predict") else _INFER) for path in posts]
    paths: dict[str, Any] = {}
    for method, path, operation in operations:
        path = path.replace(f"/models/{identity.name}", "/models/{model_name}")
        path = path.replace(f"/versions/{identity.version}", "/versions/{model_version}")
        names = [name for name in ("model_name", "model_version") if f"{{{name}}}" in path]
        parameters = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]
        paths[path] = {method: {**operation, "parameters": parameters}}
    description = f"Sorts pictures into {', '.join(CLASSES)}."
    info = {"title": "CIFAR-10 classifier", "version": identity.version, "description": description}
    return {"openapi": "3.1.0", "info": info, "paths": paths}


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _list(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def _one_of(values: Iterable[str]) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def _content(**schemas: Any) -> dict[str, Any]:
    types = {"json": JSON_TYPE, "form": "multipart/form-data"}
    return {"content": {types[kind]: {"schema": schema} for kind, schema in schemas.items()}}


def _answers(schema: dict[str, Any]) -> dict[str, Any]:
    fault = _object("error", error=_TEXT, field=_TEXT, expected=_TEXT, received=_TEXT)
    refusal = {"description": "Why the request was refused.", **_content(json=fault)}
    answer = {"description": "The answer.", **_content(json=schema)}
    return {"responses": {"200": answer, **dict.fromkeys(_REFUSALS, refusal)}}


_FILE = {"type": "string", "description": "A PNG or JPEG file in base64, or a data URI."}
_ARRAY = _list(_list(_list(_NUMBER)), description="[32, 32, 3] or [3, 32, 32] numbers: 0 to 255, or fractions.")
_INSTANCES = _list({"oneOf": [_FILE, _object("b64", b64=_TEXT), _ARRAY]})
_FORM = _object(PART_NAME, **{PART_NAME: _list({"type": "string", "format": "binary"})})
_PREDICTION = {
    "class": _one_of(CLASSES),
    "confidence": _NUMBER,
    "probabilities": _object(**dict.fromkeys(CLASSES, _NUMBER)),
}
_MODEL = {"model_name": _TEXT, "model_version": _TEXT}
_PREDICT = {
    "summary": "Classify pictures (V1)",
    "requestBody": {"required": True, **_content(json=_object("instances", instances=_INSTANCES), form=_FORM)},
    **_answers(_object(predictions=_list(_object(**_PREDICTION)), model_digest=_TEXT, **_MODEL)),
}
_TENSOR = {
    "name": _one_of([MODEL_INPUT]),
    "datatype": _one_of([DATATYPE]),
    "shape": _list({"type": "integer"}, example=[1, *IMAGE_SHAPE]),
    "data": _list({}, description="Flat or nested numbers."),
    "parameters": _object(binary_data_size={"type": "integer"}),
}
_INFER_BODY = {
    "id": _TEXT,
    "inputs": _list(_object("name", "datatype", "shape", **_TENSOR)),
    "outputs": _list(_object("name", name=_one_of(OUTPUT_NAMES))),
}
_INFER = {
    "summary": "Classify pixels (V2)",
    "requestBody": {"required": True, **_content(json=_object("inputs", **_INFER_BODY))},
    **_answers(_object(outputs=_list(_object()), id=_TEXT, **_MODEL)),
}
