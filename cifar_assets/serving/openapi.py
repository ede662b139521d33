"""What OpenAPI says about the bodies that the server reads itself."""

from typing import Any

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE, MODEL_INPUT, MODEL_NAME
from cifar_assets.serving.multipart import PART_NAME
from cifar_assets.serving.v2 import DATATYPE, OUTPUT_NAMES

_NUMBER = {"type": "number"}
_ERROR = {
    "description": "Why the request was refused.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {"type": "string"},
                    "field": {"type": "string", "example": "instances[2]"},
                    "expected": {"type": "string"},
                    "received": {"type": "string"},
                },
            }
        }
    },
}
_FAULTS = dict.fromkeys(("400", "404", "408", "413", "415", "429"), _ERROR)


def _answer(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "The answer.", "content": {"application/json": {"schema": schema}}}


PREDICT_DOCS: dict[str, Any] = {
    "summary": "Classify pictures (V1)",
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["instances"],
                    "properties": {
                        "instances": {
                            "type": "array",
                            "items": {
                                "oneOf": [
                                    {"type": "string", "description": "A picture file in base64, or a data URI."},
                                    {"type": "object", "properties": {"b64": {"type": "string"}}},
                                    {
                                        "type": "array",
                                        "description": "[32, 32, 3] or [3, 32, 32] numbers: 0 to 255, or fractions.",
                                        "items": {"type": "array", "items": {"type": "array", "items": _NUMBER}},
                                    },
                                ]
                            },
                        }
                    },
                }
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [PART_NAME],
                    "properties": {PART_NAME: {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    },
    "responses": {
        "200": _answer(
            {
                "type": "object",
                "properties": {
                    "predictions": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {
                                "class": {"type": "string", "enum": list(CLASSES)},
                                "confidence": _NUMBER,
                                "probabilities": {"type": "object", "properties": dict.fromkeys(CLASSES, _NUMBER)},
                            },
                        },
                    },
                    "model_name": {"type": "string", "example": MODEL_NAME},
                    "model_version": {"type": "string"},
                    "model_digest": {"type": "string"},
                },
            }
        ),
        **_FAULTS,
    },
}

_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string", "enum": [MODEL_INPUT]},
        "datatype": {"type": "string", "enum": [DATATYPE]},
        "shape": {"type": "array", "items": {"type": "integer"}, "example": [1, *IMAGE_SHAPE]},
        "data": {"type": "array", "items": {}, "description": "Flat or nested numbers."},
        "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer"}}},
    },
}
_INFER_SCHEMA = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {
            "type": "array",
            "items": {"type": "object", "properties": {"name": {"type": "string", "enum": list(OUTPUT_NAMES)}}},
        },
    },
}

INFER_DOCS: dict[str, Any] = {
    "summary": "Classify pixels (V2)",
    "requestBody": {"required": True, "content": {"application/json": {"schema": _INFER_SCHEMA}}},
    "responses": {"200": _answer({"type": "object"}), **_FAULTS},
}
