"""V1 bodies to images: the documented forms, and the place of every fault."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cifar_assets.contracts import CIFAR10
from cifar_assets.dataset.formats.images import ImageLimits
from cifar_assets.serving.answers import RequestError, ServedModel
from cifar_assets.serving.settings import ServingLimits
from cifar_assets.serving.v1 import parse_form, parse_predict

LIMITS = ServingLimits()
MODEL = ServedModel("cifar10", "7", "a" * 64, "d" * 64, CIFAR10)
PIXELS = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
CHW = PIXELS.transpose(2, 0, 1)


def picture(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind)
    return buffer.getvalue()


B64 = base64.b64encode(picture()).decode()


def parse(instances: Any, limits: ServingLimits = LIMITS) -> np.ndarray:
    return parse_predict(MODEL, json.dumps({"instances": instances}).encode(), limits).images()


@pytest.mark.parametrize(
    "instance",
    [
        B64,
        {"b64": B64},
        f"data:image/png;base64,{B64}",
        f"data:image/jpeg;base64,{B64}",
        f"DATA:;BASE64,{B64}",
        "\n".join(B64[start : start + 76] for start in range(0, len(B64), 76)),
        PIXELS.tolist(),
        CHW.tolist(),
        (PIXELS / 255).tolist(),
        (CHW / 255).tolist(),
    ],
)
def test_each_documented_form_gives_the_same_pixels(instance) -> None:
    np.testing.assert_array_equal(parse([instance]), CHW[None])


def test_forms_may_be_mixed_and_keep_their_order() -> None:
    other = 255 - PIXELS
    np.testing.assert_array_equal(parse([B64, other.tolist(), {"b64": B64}])[:, 0, 0, 0], [
        PIXELS[0, 0, 0], other[0, 0, 0], PIXELS[0, 0, 0]
    ])  # fmt: skip


def test_one_fraction_makes_all_numbers_fractions() -> None:
    ones = np.ones((32, 32, 3), int).tolist()
    assert (parse([ones]) == 1).all()
    ones[0][0][0] = 1.0
    assert (parse([ones]) == 255).all()


def nested(shape: tuple[int, ...], value: Any = 0) -> Any:
    return value if not shape else [nested(shape[1:], value) for _ in range(shape[0])]


def changed(value: Any) -> Any:
    array = nested((32, 32, 3))
    array[31][31][2] = value
    return array


@pytest.mark.parametrize(
    ("instance", "field", "expected", "received"),
    [
        (None, "instances[0]", "base64", "null"),
        (True, "instances[0]", "base64", "true"),
        (3, "instances[0]", "base64", "3"),
        ({}, "instances[0]", "base64", "keys []"),
        ({"b64": B64, "x": 1}, "instances[0]", "base64", "keys ['b64', 'x']"),
        ({"b64": 3}, "instances[0].b64", "base64", "3"),
        ({"image": B64}, "instances[0]", "base64", "keys ['image']"),
        ("", "instances[0]", "PNG", "an empty file"),
        ("not base64!", "instances[0]", "base64", "not base64"),
        (B64[:-1], "instances[0]", "base64", "not base64"),
        (B64[: len(B64) // 8 * 4], "instances[0]", "complete", "truncated"),
        ("aGVsbG8gd29ybGQh", "instances[0]", "PNG", "unknown kind"),
        ("data:image/png,abc", "instances[0]", "data URI", "data:image/png"),
        ("data:image/png;base64", "instances[0]", "data URI", "data:image/png;base64"),
        ([], "instances[0]", "[32, 32, 3] or [3, 32, 32]", "shape [0]"),
        ([[[]]], "instances[0]", "[32, 32, 3]", "shape [1, 1, 0]"),
        (nested((28, 28)), "instances[0]", "[32, 32, 3]", "shape [28, 28]"),
        (nested((28, 28, 3)), "instances[0]", "[32, 32, 3]", "shape [28, 28, 3]"),
        (nested((32, 32, 4)), "instances[0]", "[32, 32, 3]", "shape [32, 32, 4]"),
        (nested((32, 3, 32)), "instances[0]", "[32, 32, 3]", "shape [32, 3, 32]"),
        (nested((1, 32, 32, 3)), "instances[0]", "[32, 32, 3]", "shape [1, 32, 32, 3]"),
        (nested((3072,)), "instances[0]", "[32, 32, 3]", "shape [3072]"),
        ([*nested((31, 32, 3)), nested((31, 3))], "instances[0]", "[32, 32, 3]", "ragged"),
        ([*nested((31, 32, 3)), 7], "instances[0]", "[32, 32, 3]", "ragged"),
        (changed(256), "instances[0]", "0 to 255", "from 0 to 256"),
        (changed(-1), "instances[0]", "0 to 255", "from -1 to 0"),
        (changed(10**30), "instances[0]", "from 0 to 1 where", "1e+30"),
        (changed(1.5), "instances[0]", "from 0 to 1", "to 1.5"),
        (changed(-0.1), "instances[0]", "from 0 to 1", "from -0.1"),
        (changed(1e308), "instances[0]", "from 0 to 1", "1e+308"),
        (changed("1"), "instances[0]", "numbers", "'1'"),
        (changed(None), "instances[0]", "numbers", "null"),
        (changed(True), "instances[0]", "numbers", "true"),
        (changed({}), "instances[0]", "numbers", "an object"),
    ],
)
def test_a_bad_instance_is_refused_with_its_place(instance, field, expected, received) -> None:
    with pytest.raises(RequestError) as caught:
        parse([instance])
    assert caught.value.status == 400
    assert caught.value.field == field
    assert expected in caught.value.expected
    assert received in caught.value.received


def test_one_bad_instance_refuses_the_whole_and_names_its_index() -> None:
    with pytest.raises(RequestError) as caught:
        parse([B64, PIXELS.tolist(), "bad", B64])
    assert caught.value.field == "instances[2]"


@pytest.mark.parametrize(
    ("body", "field", "received"),
    [
        (b"", "body", "0 bytes that are not valid JSON"),
        (b'{"instances": [', "body", "not valid JSON"),
        (b'{"instances": [NaN]}', "body", "not valid JSON"),
        (b"\xff\xfe", "body", "not valid JSON"),
        (b"[1]", "body", "a list of 1"),
        (b"null", "body", "null"),
        (b"{}", "instances", "keys []"),
        (b'{"inputs": []}', "instances", "['inputs']"),
        (b'{"instances": null}', "instances", "null"),
        (b'{"instances": {}}', "instances", "an object"),
        (b'{"instances": "abc"}', "instances", "'abc'"),
        (b'{"instances": []}', "instances", "none"),
        (b'{"instances": ' + b"[" * 5000 + b"]" * 5000 + b"}", "body", "not valid JSON"),
    ],
)
def test_a_bad_body_is_refused(body, field, received) -> None:
    with pytest.raises(RequestError) as caught:
        parse_predict(MODEL, body, LIMITS)
    assert caught.value.status == 400
    assert caught.value.field == field
    assert received in caught.value.received


def test_limits_are_refused_before_the_bytes_are_read() -> None:
    small = ServingLimits(image=ImageLimits(max_bytes=100), max_images=2)
    for instances, field in (
        ([B64], "instances[0]"),
        ([f"data:image/png;base64,{B64}"], "instances[0]"),
        (["!" * 1000], "instances[0]"),
        ([0, 0, 0], "instances"),
        ([nested((10000,))], "body"),
    ):
        with pytest.raises(RequestError) as caught:
            parse(instances, small)
        assert caught.value.status == 413
        assert caught.value.field == field


def test_the_largest_batch_of_arrays_is_within_the_limit_of_json_values() -> None:
    images = parse([PIXELS.tolist()] * LIMITS.max_images)
    assert images.shape == (LIMITS.max_images, 3, 32, 32)


@pytest.mark.fuzz
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=12,
    )
)
def test_any_json_is_answered_with_a_fault_of_the_client(value) -> None:
    for body in (json.dumps(value).encode(), json.dumps({"instances": value}).encode()):
        with pytest.raises(RequestError) as caught:
            parse_predict(MODEL, body, LIMITS)
        assert 400 <= caught.value.status < 500
        assert len(str(caught.value)) < 600


TYPE = "multipart/form-data; boundary=xyz"


def form(*parts: tuple[str, bytes], end: bytes = b"--xyz--\r\n") -> bytes:
    pieces = [f"--xyz\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data for head, data in parts]
    return b"\r\n".join([*pieces, end]) if pieces else end


FILE = 'name="image"; filename="a.png"'


def parsed_form(content_type: str, body: bytes, limits: ServingLimits = LIMITS) -> np.ndarray:
    return parse_form(MODEL, content_type.encode(), body, limits).images()


class TestForm:
    def test_parts_are_images_in_order(self) -> None:
        other = np.zeros((32, 32, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(other).save(buffer, "PNG")
        body = form((FILE, picture()), (FILE, buffer.getvalue()), ('name="image"', picture()))
        np.testing.assert_array_equal(parsed_form(TYPE, body), [CHW, other.transpose(2, 0, 1), CHW])

    def test_a_quoted_boundary_and_other_headers_are_read(self) -> None:
        body = form((f"{FILE}\r\nContent-Type: text/plain\r\nX-Other: 1", picture()))
        np.testing.assert_array_equal(parsed_form('Multipart/Form-Data; boundary="xyz"', body), CHW[None])

    @pytest.mark.parametrize(
        ("content_type", "body", "field", "received"),
        [
            (TYPE, form(), "image", "none"),
            (TYPE, form(('name="file"; filename="a.png"', picture())), "image", "'file'"),
            (TYPE, form((FILE, picture()), ('name="label"', b"cat")), "image", "'label'"),
            (TYPE, form((FILE, b"")), "image[0]", "an empty file"),
            (TYPE, form((FILE, picture()), (FILE, b"hello")), "image[1]", "a file of an unknown kind of 5 bytes"),
            (TYPE, form((FILE, picture()[:900])), "image[0]", "truncated"),
            (TYPE, form((FILE, picture()), end=b""), "image[0]", "cut off"),
            (TYPE, form((FILE, picture()))[:-400], "image[0]", "cut off"),
            (TYPE, b"", "body", "cut off"),
            (TYPE, b"no form at all", "body", "cut off"),
            (TYPE, form(("filename=x", picture())), "image", "part 1 with the name ''"),
            (TYPE, b"--xyz\r\n\r\nabc\r\n--xyz--\r\n", "image", "part 1"),
            (TYPE, b"--xyz\r\nbad header\r\n\r\nabc\r\n--xyz--\r\n", "image", "part 1"),
            ("multipart/form-data", form((FILE, picture())), "Content-Type", "names none"),
            ("multipart/form-data; boundary=", form((FILE, picture())), "Content-Type", "names none"),
            ("multipart/form-data; boundary=" + "x" * 1000, form((FILE, picture())), "body", "cut off"),
            ("multipart/form-data; boundary=abc", form((FILE, picture())), "body", ""),
        ],
    )
    def test_a_bad_form_is_refused_with_its_place(self, content_type, body, field, received) -> None:
        with pytest.raises(RequestError) as caught:
            parsed_form(content_type, body)
        assert caught.value.status == 400
        assert caught.value.field == field
        assert received in caught.value.received

    def test_limits(self) -> None:
        small = ServingLimits(image=ImageLimits(max_bytes=100), max_images=2)
        with pytest.raises(RequestError, match=r"image\[0\]: expected an image file of at most 100 bytes") as caught:
            parsed_form(TYPE, form((FILE, picture())), small)
        assert caught.value.status == 413
        with pytest.raises(RequestError, match="image: expected at most 2 images, got 3") as caught:
            parsed_form(TYPE, form(*[(FILE, b"x")] * 3), small)
        assert caught.value.status == 413

    @pytest.mark.fuzz
    @given(body=st.binary(max_size=300) | st.builds(
        lambda position, value: form((FILE, picture()))[:position] + value + form((FILE, picture()))[position:],
        st.integers(0, 400),
        st.binary(min_size=1, max_size=5),
    ))  # fmt: skip
    def test_any_bytes_are_answered(self, body) -> None:
        try:
            images = parsed_form(TYPE, body)
        except RequestError as error:
            status = error.status
        else:
            status = 200
            assert images.shape[1:] == (3, 32, 32)
        assert status < 500
