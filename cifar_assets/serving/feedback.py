"""`POST /v1/feedback`: a program tells the class of an image that the server classified earlier."""

import time

from pydantic import BaseModel, Field

from cifar_assets.serving.answers import BusyError, RequestError, Response, ServedModel, error_response, json_response
from cifar_assets.serving.http import Request
from cifar_assets.serving.json_body import parse_json
from cifar_assets.serving.recorder import Recorder
from cifar_assets.traffic.records import Feedback

FEEDBACK_PATH = "/v1/feedback"
_MAX_ITEMS = 10


class _Body(BaseModel, extra="forbid"):
    request_id: str = Field(min_length=1, max_length=128)
    index: int = Field(0, ge=0, lt=2**31)
    label: str


def take_feedback(recorder: Recorder, model: ServedModel, request: Request) -> Response:
    """Queue it for the record: 202. It counts if the image was recorded, which the server does not know."""
    try:
        body = parse_json(_Body, request.body, _MAX_ITEMS)
        if body.label not in model.images.classes:
            raise RequestError("label", f"one of {', '.join(model.images.classes)}", ascii(body.label[:50]))
        if not recorder.add_feedback(Feedback(**body.model_dump(), time=time.time())):
            raise BusyError("fewer labels at a time", "more than the record can hold")
    except RequestError as error:
        return error_response(error)
    return json_response(body.model_dump(), 202)
