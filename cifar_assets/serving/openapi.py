"""The addresses and bodies of the server as an OpenAPI document."""

from collections.abc import Iterable
from typing import Any

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE, MODEL_INPUT
from cifar_assets.serving.messages import ModelIdentity
from cifar_assets.serving.multipart import PART_NAME
from cifar_assets.serving.v2 import DATATYPE, OUTPUT_NAMES

_TEXT, _NUMBER, _INTEGER = {"type": "string"}, {"type": "number"}, {"type": "integer"}
_SUMMARIES = {
    "": "Inputs and outputs of the model",
    "/": "Liveness",
    "/v1/models": "Names of the models",
    "/v2/models": "Names of the models",
    "/v2": "Server metadata",
    "/v2/health/live": "Liveness",
    "/v2/health/ready": "Readiness",
    "/metrics": "Prometheus metrics",
    "/openapi.json": "This document",
}
_REFUSALS = ("400", "404", "405", "408", "413", "415", "429", "431", "500", "503")


def describe(identity: ModelIdentity, gets: Iterable[str], posts: Iterable[str]) -> dict[str, Any]:
    """The document for these addresses. The name of the model is a parameter, as in the protocols."""
    paths: dict[str, Any] = {}
    for path in gets:
        ready = path.endswith("/ready") or path.startswith("/v1/models/")
        summary = _SUMMARIES.get(path, "Readiness, version and digest of the model" if ready else _SUMMARIES[""])
        paths[_template(path, identity)] = {"get": {"summary": summary, **_parameters(path, identity), **_answers({})}}
    for path in posts:
        post = _PREDICT if path.endswith(":predict") else _INFER
        paths[_template(path, identity)] = {"post": {**post, **_parameters(path, identity)}}
    info = {
        "title": "CIFAR-10 classifier",
        "version": identity.version,
        "description": f"Sorts pictures into {', '.join(CLASSES)}.",
    }
    return {"openapi": "3.1.0", "info": info, "paths": paths}


def _template(path: str, identity: ModelIdentity) -> str:
    path = path.replace(f"/models/{identity.name}", "/models/{model_name}")
    return path.replace(f"/versions/{identity.version}", "/versions/{model_version}")


def _parameters(path: str, identity: ModelIdentity) -> dict[str, Any]:
    names = [name for name in ("model_name", "model_version") if f"{{{name}}}" in _template(path, identity)]
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _list(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def _content(**schemas: Any) -> dict[str, Any]:
    return {"content": {kind.replace("_", "/"): {"schema": schema} for kind, schema in schemas.items()}}


def _answers(schema: dict[str, Any]) -> dict[str, Any]:
    fault = _object(("error",), error=_TEXT, field=_TEXT, expected=_TEXT, received=_TEXT)
    refusal = {"description": "Why the request was refused.", **_content(application_json=fault)}
    answer = {"description": "The answer.", **_content(application_json=schema)}
    return {"responses": {"200": answer, **dict.fromkeys(_REFUSALS, refusal)}}


_INSTANCE = {
    "oneOf": [
        {"type": "string", "description": "A PNG or JPEG file in base64, or a data URI."},
        _object(("b64",), b64=_TEXT),
        _list(_list(_list(_NUMBER)), description="[32, 32, 3] or [3, 32, 32] numbers: 0 to 255, or fractions."),
    ]
}
_FORM = {"multipart/form-data": {"schema": _object((PART_NAME,), **{PART_NAME: _list({**_TEXT, "format": "binary"})})}}
_PREDICTION = _object(
    (),
    **{"class": {**_TEXT, "enum": list(CLASSES)}},
    confidence=_NUMBER,
    probabilities=_object(**dict.fromkeys(CLASSES, _NUMBER)),
)
_PREDICT_BODY = _content(application_json=_object(("instances",), instances=_list(_INSTANCE)))
_PREDICT = {
    "summary": "Classify pictures (V1)",
    "requestBody": {"required": True, "content": {**_PREDICT_BODY["content"], **_FORM}},
    **_answers(
        _object(predictions=_list(_PREDICTION), model_name=_TEXT, model_version=_TEXT, model_digest=_TEXT),
    ),
}
_TENSOR = _object(
    ("name", "datatype", "shape"),
    name={**_TEXT, "enum": [MODEL_INPUT]},
    datatype={**_TEXT, "enum": [DATATYPE]},
    shape=_list(_INTEGER, example=[1, *IMAGE_SHAPE]),
    data=_list({}, description="Flat or nested numbers."),
    parameters=_object(binary_data_size=_INTEGER),
)
_WANTED = _list(_object(("name",), name={**_TEXT, "enum": list(OUTPUT_NAMES)}))
_INFER_BODY = _content(application_json=_object(("inputs",), id=_TEXT, inputs=_list(_TENSOR), outputs=_WANTED))
_INFER = {
    "summary": "Classify pixels (V2)",
    "requestBody": {"required": True, **_INFER_BODY},
    **_answers(_object(model_name=_TEXT, model_version=_TEXT, id=_TEXT, outputs=_list(_object()))),
}
