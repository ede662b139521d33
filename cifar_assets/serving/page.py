"""The page for people at the server's root, and the request that it sends.

The page is one document, without other files to fetch: a proxy may serve it under any path, and its parts cannot come
from different releases.
"""

import base64
import hashlib
import html
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import orjson

from cifar_assets.dataset.formats.images import png_bytes, to_pillow
from cifar_assets.serving import v1
from cifar_assets.serving.answers import Headers, Images, Logits, Query, Response, ServedModel, json_response
from cifar_assets.serving.settings import ServingLimits

PREDICT_PATH = "/page/predict"
_HTML = Path(__file__).with_name("page.html")
NEGOTIATED = (("Cache-Control", "no-cache"), ("Vary", "Accept"))
"""Headers of both answers at the root: a cache must not give a browser the other one."""
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


def page(model: ServedModel) -> Response:
    """The document for this model."""
    facts = {
        **_identity(model),
        "name": model.name,
        "size": str(model.images.image_size),
        "classes": ", ".join(model.images.classes),
    }
    return document(_HTML, facts, NEGOTIATED)


def document(path: Path, facts: Mapping[str, str], headers: Headers = ()) -> Response:
    """The file with the facts in place of {{their names}}. Its policy allows only its own script and style, by hash."""
    text = path.read_text(encoding="utf-8")
    policy = _POLICY
    for kind, content in re.findall(r"<(script|style)>(.*?)</\1>", text, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy += f"; {kind}-src 'sha256-{digest}'"
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: html.escape(facts[found[1]]), text)
    headers = (
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        *headers,
    )
    return Response(200, text.encode(), "text/html; charset=utf-8", headers)


def parse(model: ServedModel, headers: Mapping[bytes, bytes], body: bytes, limits: ServingLimits) -> Query:
    """One picture, as in V1. The answer also has the pixels that the model got, as a PNG. Raises RequestError."""
    query = v1.parse(model, headers, body, limits.model_copy(update={"max_images": 1}))
    decoded: list[Images] = []

    def images() -> Images:
        decoded[:] = [query.images()]
        return decoded[0]

    def render(logits: Logits) -> Response:
        picture = f"data:image/png;base64,{base64.b64encode(png_bytes(to_pillow(decoded[0][0]))).decode()}"
        return json_response({**orjson.loads(query.render(logits).body), **_identity(model), "picture": picture})

    return replace(query, images=images, render=render)


def _identity(model: ServedModel) -> dict[str, str]:
    return {
        "model_version": model.version,
        "model_digest": model.digest,
        "dataset_digest": model.dataset_digest,
    }
