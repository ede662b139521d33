"""The server as a process, over HTTP."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from httpx import HTTPStatusError
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput
from PIL import Image

from cifar_assets.contracts import CLASSES
from cifar_assets.serving.classifier import softmax
from resources.inference_service.client import InferenceClient, ServerError
from resources.object_store import FolderStore
from tests.unit.serving.server_process import PATIENT, Answer, ServerProcess, ask, form, run_server
from tests.unit.serving.tiny_model import store_tiny_model, tiny_logits, tiny_onnx

PREDICT = "/v1/models/cifar10:predict"
INFER = "/v2/models/cifar10/infer"
RNG = np.random.default_rng(11)
PIXELS = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
SMOOTH = np.array(Image.fromarray(PIXELS[:4, :4]).resize((32, 32), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def digest_and_server(tmp_path_factory) -> Iterator[tuple[str, ServerProcess]]:
    folder = tmp_path_factory.mktemp("server")
    uri, digest = store_tiny_model(FolderStore(folder / "models"))
    with run_server(uri, digest, folder, "--model-version", "7", *PATIENT) as server:
        yield digest, server
        assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def server(digest_and_server) -> ServerProcess:
    return digest_and_server[1]


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def expected_probabilities(*images: np.ndarray) -> np.ndarray:
    stacked = np.stack(images).transpose(0, 3, 1, 2)
    return softmax(tiny_logits(stacked).astype(np.float32))


def probabilities(answer: Answer) -> np.ndarray:
    assert answer.status == 200, answer.body
    return np.array([[row["probabilities"][name] for name in CLASSES] for row in answer.json["predictions"]])


def upload(server: ServerProcess, *files: bytes, content_type: str = "image/png") -> Answer:
    return server.post(PREDICT, *form(*[("image", data) for data in files], content_type=content_type))


def check_refused(server: ServerProcess, answer: Answer, status: int, field: str, words: str) -> None:
    """An error of the client: its status, a JSON error that names place and reason, and the server continues."""
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json
    assert field in body["field"]
    assert words in body["error"]
    assert body["expected"]
    assert body["received"]
    assert b"Traceback" not in answer.body
    assert b"/cifar_assets" not in answer.body
    assert upload(server, encode(PIXELS)).status == 200
    assert server.process.poll() is None


def test_the_answer_names_class_confidence_all_probabilities_and_the_model(digest_and_server) -> None:
    digest, server = digest_and_server
    answer = upload(server, encode(PIXELS)).json
    assert set(answer) == {"predictions", "model_name", "model_version", "model_digest"}
    assert (answer["model_name"], answer["model_version"], answer["model_digest"]) == ("cifar10", "7", digest)
    (prediction,) = answer["predictions"]
    assert list(prediction["probabilities"]) == list(CLASSES)
    assert prediction["class"] == max(prediction["probabilities"], key=prediction["probabilities"].__getitem__)
    assert prediction["confidence"] == prediction["probabilities"][prediction["class"]]
    assert sum(prediction["probabilities"].values()) == pytest.approx(1)


def test_every_request_format_gets_the_same_answer(server) -> None:
    expected = expected_probabilities(PIXELS)
    b64 = base64.b64encode(encode(PIXELS)).decode()
    for instance in (b64, {"b64": b64}, f"data:image/png;base64,{b64}", PIXELS.tolist(), (PIXELS / 255).tolist()):
        answer = server.post(PREDICT, {"instances": [instance]})
        np.testing.assert_allclose(probabilities(answer), expected, atol=1e-4)
    np.testing.assert_allclose(probabilities(upload(server, encode(PIXELS))), expected, atol=1e-4)


class TestBrokenUploads:
    """Files that are not valid pictures."""

    NOISE = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)

    @pytest.mark.parametrize(
        ("parts", "field", "words"),
        [
            ([], "image", "at least one image"),
            ([("file", encode(PIXELS))], "image", "the name 'file'"),
            ([("image", b"")], "image[0]", "an empty file"),
            ([("image", (data := encode(NOISE, "JPEG"))[: len(data) // 2])], "image[0]", "truncated"),
            ([("image", b"just some text")], "image[0]", "unknown kind of 14 bytes"),
            ([("image", encode(PIXELS)), ("image", b"")], "image[1]", "an empty file"),
            ([("image", encode(PIXELS)), ("image", encode(PIXELS)[:500])], "image[1]", "truncated"),
            ([("image", b"%PDF-1.4")], "image[0]", "unknown kind"),
            ([("image", b"\x00" * 1000)], "image[0]", "unknown kind"),
        ],
    )
    def test_forms(self, server, parts, field, words) -> None:
        check_refused(server, server.post(PREDICT, *form(*parts)), 400, field, words)

    def test_bytes_decide_not_the_declared_type(self, server) -> None:
        for declared in ("image/jpeg", "text/plain", "application/x-whatever"):
            answer = upload(server, encode(PIXELS), content_type=declared)
            np.testing.assert_allclose(probabilities(answer), expected_probabilities(PIXELS), atol=1e-4)

    def test_several_files_are_answered_in_order(self, server) -> None:
        answer = upload(server, encode(PIXELS), encode(SMOOTH), encode(PIXELS))
        np.testing.assert_allclose(probabilities(answer), expected_probabilities(PIXELS, SMOOTH, PIXELS), atol=1e-4)

    @pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
    def test_json_is_accepted_with_any_content_type_of_curl(self, server, content_type) -> None:
        body = json.dumps({"instances": [PIXELS.tolist()]}).encode()
        assert server.post(PREDICT, body, content_type).status == 200

    @pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "application/xml"])
    def test_other_types_are_refused(self, server, content_type) -> None:
        check_refused(server, server.post(PREDICT, encode(PIXELS), content_type), 415, "Content-Type", content_type)

    @pytest.mark.parametrize(
        ("body", "field", "words"),
        [
            (b'{"instances": [[[[1, 2', "body", "not valid JSON"),
            (b"", "body", "empty"),
            (b'{"instances": ["AAAA", 1]}', "instances[1]", "got 1"),
        ],
    )
    def test_json(self, server, body, field, words) -> None:
        check_refused(server, server.post(PREDICT, body), 400, field, words)

    def test_invalid_instance_rejects_the_request_with_its_index(self, server) -> None:
        ragged = PIXELS.tolist()
        ragged[5].pop()
        for bad, words in ((ragged, "ragged"), (PIXELS[:28, :28].tolist(), "[28, 28, 3]"), (None, "null")):
            answer = server.post(PREDICT, {"instances": [PIXELS.tolist(), bad]})
            check_refused(server, answer, 400, "instances[1]", words)


class TestTensors:
    """The parser's unit tests have the complete table of declarations."""

    @staticmethod
    def tensor(images: np.ndarray, **changes: Any) -> dict[str, Any]:
        values = {"name": "images", "datatype": "UINT8", "shape": list(images.shape), "data": images.ravel().tolist()}
        return {"inputs": [{**values, **changes}]}

    IMAGES = np.stack([PIXELS, SMOOTH]).transpose(0, 3, 1, 2)

    def test_input_described_by_the_metadata_is_accepted(self, server) -> None:
        metadata = server.get("/v2/models/cifar10").json
        (declared,) = metadata["inputs"]
        body = {
            "inputs": [
                {
                    "name": declared["name"],
                    "datatype": declared["datatype"],
                    "shape": [len(self.IMAGES), *declared["shape"][1:]],
                    "data": self.IMAGES.ravel().tolist(),
                }
            ]
        }
        outputs = server.post(INFER, body).json["outputs"]
        found = [(output["name"], output["datatype"], [-1, *output["shape"][1:]]) for output in outputs]
        assert found == [(output["name"], output["datatype"], output["shape"]) for output in metadata["outputs"]]

    def test_flat_nested_and_binary_give_equal_probabilities(self, server) -> None:
        flat = server.post(INFER, self.tensor(self.IMAGES)).json["outputs"][0]["data"]
        nested = server.post(INFER, self.tensor(self.IMAGES, data=self.IMAGES.tolist())).json["outputs"][0]["data"]
        binary = InferenceClient(server.url, timeout=300).predict_arrays(self.IMAGES).probabilities
        assert flat == nested
        np.testing.assert_array_equal(np.float32(flat).reshape(2, 10), binary.astype(np.float32))
        np.testing.assert_allclose(binary, expected_probabilities(PIXELS, SMOOTH), atol=1e-4)

    @pytest.mark.parametrize(
        ("changes", "status", "words"),
        [
            ({"data": [0] * 6143}, 400, "[6144]"),
            ({"shape": [10**9, 3, 32, 32]}, 413, "at most 64 images"),
            ({"datatype": "FP32"}, 400, "'UINT8'"),
        ],
    )
    def test_declarations(self, server, changes, status, words) -> None:
        check_refused(server, server.post(INFER, self.tensor(self.IMAGES, **changes)), status, "inputs[0]", words)

    def test_binary_lengths(self, server) -> None:
        header = json.dumps(
            {
                "inputs": [
                    {
                        "name": "images",
                        "datatype": "UINT8",
                        "shape": [1, 3, 32, 32],
                        "parameters": {"binary_data_size": 3072},
                    }
                ]
            }
        ).encode()
        for length, num_bytes, field in (
            (10**6, 3072, "Inference-Header-Content-Length"),
            (-1, 3072, "Inference-Header-Content-Length"),
            (len(header), 3071, "inputs[0].parameters.binary_data_size"),
            (len(header), 3073, "inputs[0].parameters.binary_data_size"),
            (len(header) - 1, 3072, "body"),
        ):
            answer = server.post(
                INFER,
                header + bytes(num_bytes),
                "application/octet-stream",
                Inference_Header_Content_Length=str(length),
            )
            check_refused(server, answer, 400, field, "expected")


class TestPictureModes:
    """Pictures of every kind."""

    def ask(self, server: ServerProcess, *files: bytes) -> np.ndarray:
        return probabilities(upload(server, *files))

    def test_lossless_variants_answer_like_rgb(self, server) -> None:
        few = (SMOOTH // 64 * 64).astype(np.uint8)
        palette = Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
        opaque = np.dstack([few, np.full((32, 32), 255, np.uint8)])
        variants = [
            encode(opaque),
            encode(palette),
        ]
        answers = self.ask(server, encode(few), *variants)
        np.testing.assert_allclose(answers[1:], np.tile(answers[0], (len(variants), 1)), atol=1e-6)

    def test_gray_variants_get_the_same_answer(self, server) -> None:
        gray = SMOOTH[:, :, 0]
        rgb = np.dstack([gray] * 3)
        variants = [encode(gray), encode(np.dstack([gray, gray * 0 + 255])), encode(gray.astype(np.uint16) * 257)]
        answers = self.ask(server, encode(rgb), *variants)
        np.testing.assert_allclose(answers[1:], np.tile(answers[0], (3, 1)), atol=1e-6)
        bits = Image.fromarray((gray > 127).astype(np.uint8) * 255)
        one, eight = self.ask(server, encode(bits.convert("1")), encode(bits.convert("RGB")))
        np.testing.assert_allclose(one, eight, atol=1e-6)

    def test_lossy_variants_answer_nearly_like_rgb(self, server) -> None:
        image = Image.fromarray(SMOOTH)
        lossy = [encode(image, "JPEG", quality=95), encode(image, "JPEG", quality=95, progressive=True)]
        answers = self.ask(server, encode(image), *lossy)
        np.testing.assert_allclose(answers[1:], np.tile(answers[0], (2, 1)), atol=0.05)

    def test_hidden_colors_do_not_matter(self, server) -> None:
        alpha = np.where(np.arange(32)[:, None] < 16, 0, 255) * np.ones((1, 32))
        pairs = []
        for colors in (PIXELS, np.where(alpha[:, :, None] == 0, 255 - PIXELS, PIXELS).astype(np.uint8)):
            pairs.append(encode(np.dstack([colors, alpha.astype(np.uint8)])))
        for hidden in ((255, 0, 0), (0, 0, 255)):
            image = Image.fromarray((np.arange(1024) % 3).astype(np.uint8).reshape(32, 32))
            image.putpalette([*hidden, 10, 20, 30, 200, 100, 50])
            pairs.append(encode(image, transparency=0))
        answers = self.ask(server, *pairs)
        np.testing.assert_array_equal(answers[0], answers[1])
        np.testing.assert_array_equal(answers[2], answers[3])

    def test_only_the_first_frame_of_an_animation_counts(self, server) -> None:
        first, second = (Image.new("RGB", (32, 32), color) for color in ((250, 0, 0), (0, 0, 250)))
        animation = encode(first, save_all=True, append_images=[second])
        answers = self.ask(server, animation, encode(first))
        np.testing.assert_array_equal(answers[0], answers[1])

    def test_other_formats_are_refused_by_name(self, server) -> None:
        for kind, name in (("TIFF", "TIFF"), ("GIF", "GIF"), ("WEBP", "WebP")):
            answer = upload(server, encode(Image.fromarray(PIXELS), kind))
            check_refused(server, answer, 400, "image[0]", name)


class TestLimits:
    def test_a_picture_of_too_many_pixels(self, server) -> None:
        header = bytearray(encode(PIXELS))
        header[16:24] = (60000).to_bytes(4, "big") * 2
        answer = upload(server, bytes(header))
        assert answer.status in (400, 413)  # Pillow may refuse the header's check sum first
        check_refused(server, answer, answer.status, "image[0]", "expected")
        large = encode(Image.new("1", (4097, 4096)))
        check_refused(
            server, upload(server, large), 413, "image[0]", "at most 8388608 pixels and 16384 on a side, got 4097x4096"
        )

    def test_too_many_pictures(self, server) -> None:
        check_refused(server, upload(server, *[encode(PIXELS)] * 65), 413, "image", "at most 64 images")
        assert len(probabilities(upload(server, *[encode(PIXELS)] * 64))) == 64

    def test_a_body_that_is_too_long(self, server) -> None:
        answer = server.post(PREDICT, bytes(17 * 1024 * 1024))
        check_refused(server, answer, 413, "body", "at most 16777216 bytes")

    def test_an_endless_body(self, server) -> None:
        """An endless chunked body is answered at the limit, although the client keeps sending."""
        with socket.create_connection(("127.0.0.1", server.port), timeout=300) as connection:
            connection.sendall(f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    connection.sendall(chunk)
            with contextlib.suppress(ConnectionError):
                assert connection.recv(100).startswith(b"HTTP/1.1 413")
        assert upload(server, encode(PIXELS)).status == 200

    def test_too_many_json_values(self, server) -> None:
        body = b'{"instances": [' + b"[]," * 400_000 + b"[]]}"
        check_refused(server, server.post(PREDICT, body), 413, "body", "JSON values")

    def test_a_compressed_body(self, server) -> None:
        answer = server.post(PREDICT, b"\x1f\x8b", Content_Encoding="gzip")
        check_refused(server, answer, 415, "Content-Encoding", "uncompressed")


class TestSurface:
    def test_health_and_metadata(self, digest_and_server) -> None:
        digest, server = digest_and_server
        served = {"name": "cifar10", "ready": True, "model_version": "7", "model_digest": digest}
        for path, expected in {
            "/": {"status": "alive"},
            "/v1/models": {"models": ["cifar10"]},
            "/v2/models": {"models": ["cifar10"]},
            "/v1/models/cifar10": served,
            "/v2/models/cifar10/ready": served,
            "/v2/health/live": {"live": True},
            "/v2/health/ready": {"ready": True},
        }.items():
            answer = server.get(path)
            assert (answer.status, answer.json) == (200, expected), path
        metadata = server.get("/v2/models/cifar10").json
        reason = "set by the server's options"
        assert metadata["properties"] == {"model_digest": digest, "precision": "float32", "precision_reason": reason}
        assert metadata["versions"] == ["7"]
        assert "binary_tensor_data" in server.get("/v2").json["extensions"]

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/v1/models/other", 404),
            ("GET", "/v2/models/other", 404),
            ("POST", "/v1/models/other:predict", 404),
            ("POST", "/v2/models/other/infer", 404),
            ("POST", "/v2/repository/models/cifar10/unload", 404),
            ("POST", "/v1/models/cifar10:explain", 404),
            ("GET", "/v2/models/cifar10/versions/9", 404),
            ("GET", "/nothing", 404),
            ("GET", PREDICT, 405),
            ("DELETE", "/v1/models/cifar10", 405),
            ("POST", "/v1/models/cifar10", 405),
        ],
    )
    def test_an_unknown_address_gets_a_json_error(self, server, method, path, status) -> None:
        answer = server.post(path, {"instances": [PIXELS.tolist()]}) if method == "POST" else None
        if answer is None:
            with contextlib.closing(server.connect()) as connection:
                connection.request(method, path)
                response = connection.getresponse()
                found, body = response.status, json.loads(response.read())
        else:
            found, body = answer.status, answer.json
        assert found == status
        assert body["error"]

    @pytest.mark.parametrize(
        ("path", "allowed"),
        [
            (PREDICT, "POST"),
            (INFER, "POST"),
            ("/v2/models/cifar10/versions/7/infer", "POST"),
            ("/v1/models/cifar10", "GET, HEAD"),
            ("/v2/health/live", "GET, HEAD"),
            ("/metrics", "GET, HEAD"),
        ],
    )
    def test_allow_names_the_methods_that_are_allowed(self, server, path, allowed) -> None:
        answer = ask(server.port, "DELETE", path)
        assert (answer.status, answer.headers["Allow"]) == (405, allowed)
        for method in ("GET", "HEAD", "POST", "PUT", "OPTIONS"):
            status = ask(server.port, method, path, b"{}" if method == "POST" else None).status
            assert (status == 405) == (method not in allowed.split(", ")), method

    def test_head_answers_where_get_does(self, server) -> None:
        for path in ("/", "/v1/models", "/v2", "/v2/models/cifar10", "/v2/health/ready", "/metrics", "/openapi.json"):
            head, get = (ask(server.port, method, path) for method in ("HEAD", "GET"))
            assert (head.status, head.body) == (get.status, b""), path
            assert head.headers["Content-Type"] == get.headers["Content-Type"]

    def test_version_may_be_named_and_other_versions_are_not_found(self, server) -> None:
        tensor = TestTensors.tensor(TestTensors.IMAGES)
        assert server.get("/v2/models/cifar10/versions/7").json == server.get("/v2/models/cifar10").json
        assert server.get("/v2/models/cifar10/versions/7/ready").json["ready"] is True
        assert server.post("/v2/models/cifar10/versions/7/infer", tensor).json == server.post(INFER, tensor).json
        answer = server.post("/v2/models/cifar10/versions/8/infer", tensor)
        assert (answer.status, "version 7" in answer.json["error"]) == (404, True)

    def test_equivalent_addresses_are_accepted(self, server) -> None:
        for path in ("/v1/models/cifar10/", "/v1/models/cifar%310", "/v1/models/cifar10?x=1", "/v1%2Fmodels/cifar10"):
            assert server.get(path).json["name"] == "cifar10", path

    def test_the_metadata_names_the_picture_formats(self, server) -> None:
        assert server.get("/v2/models/cifar10").json["picture_formats"] == ["PNG", "JPEG"]

    def test_metrics_count_requests_and_errors(self, server) -> None:
        def sample(name: str) -> float:
            time.sleep(0.3)  # they are collected a few times a second
            lines = server.get("/metrics").body.decode().splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

        before = {name: sample(name) for name in ("cifar10_batch_images_sum", "request_predict_seconds_count")}
        refused = sample('cifar10_responses_total{method="POST",status="400"}')
        upload(server, encode(PIXELS), encode(PIXELS))
        server.post(PREDICT, b"{}")
        assert sample("cifar10_batch_images_sum") == before["cifar10_batch_images_sum"] + 2
        assert sample("request_predict_seconds_count") == before["request_predict_seconds_count"] + 1
        assert sample('cifar10_responses_total{method="POST",status="400"}') == refused + 1
        assert sample("cifar10_pending_requests ") == 0
        assert sample("cifar10_pending_bytes ") == 0

    def test_openapi_describes_both_protocols(self, server) -> None:
        api = server.get("/openapi.json").json
        predict = api["paths"]["/v1/models/{model_name}:predict"]["post"]
        assert set(predict["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
        assert {"200", "400", "413", "429"} <= set(predict["responses"])
        assert "/v2/models/{model_name}/infer" in api["paths"]
        assert not [path for path in api["paths"] if "repository" in path or "explain" in path]
        versioned = {path.replace("/versions/{model_version}", "") for path in api["paths"] if "version}" in path}
        assert versioned == {path for path in api["paths"] if "{model_name}" in path and "version}" not in path}
        assert len(api["paths"]) == 8 + 2 * len(versioned) == 18
        for path, methods in api["paths"].items():
            for method in methods:
                named = path.replace("{model_name}", "cifar10").replace("{model_version}", "7")
                assert ask(server.port, method.upper(), named).status in (200, 400), named

    def test_listening_is_on_loopback_only(self, server) -> None:
        lines = Path(f"/proc/{server.process.pid}/net/tcp").read_text().splitlines()[1:]
        listening = [line.split()[1] for line in lines if line.split()[3] == "0A"]
        assert f"0100007F:{server.port:04X}" in listening
        assert f"00000000:{server.port:04X}" not in listening


class TestClient:
    def test_arrays_of_any_number_and_files(self, digest_and_server, tmp_path) -> None:
        digest, server = digest_and_server
        client = InferenceClient(server.url, timeout=300)
        images = RNG.integers(0, 256, (150, 3, 32, 32), dtype=np.uint8)
        predictions = client.predict_arrays(images)
        assert (predictions.model_digest, predictions.model_version) == (digest, "7")
        np.testing.assert_allclose(
            predictions.probabilities, expected_probabilities(*images.transpose(0, 2, 3, 1)), atol=1e-4
        )
        paths = [tmp_path / "a.png", tmp_path / "b.png"]
        paths[0].write_bytes(encode(PIXELS))
        paths[1].write_bytes(encode(SMOOTH))
        from_files = client.predict_files(paths)
        np.testing.assert_allclose(from_files.probabilities, expected_probabilities(PIXELS, SMOOTH), atol=1e-4)
        assert from_files.classes == tuple(CLASSES[index] for index in from_files.probabilities.argmax(axis=1))
        served = client.served_model()
        assert (served.ready, served.model_digest, served.model_version) == (True, digest, "7")

    def test_errors_name_the_request(self, server, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # loopback is not reached through a proxy
        client = InferenceClient(server.url, timeout=300)
        (tmp_path / "x.png").write_bytes(b"x")
        with pytest.raises(ServerError, match=r"image\[0\]") as caught:
            client.predict_files([tmp_path / "x.png"])
        assert caught.value.status == 400
        with pytest.raises(ValueError, match="uint8"):
            client.predict_arrays(np.zeros((1, 3, 32, 32)))  # pyright: ignore[reportArgumentType] - the fault under test
        with pytest.raises(ServerError, match="got no response") as caught:
            InferenceClient("http://127.0.0.1:9").served_model()
        assert caught.value.status is None


class TestKserveClient:
    """The unmodified client of the kserve SDK."""

    @staticmethod
    def ask(server: ServerProcess, protocol: str, method: str, *arguments: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with InferenceRESTClient(RESTConfig(protocol=protocol, timeout=300)) as client:
                return await getattr(client, method)(server.url, *arguments, **options)

        return asyncio.run(run())

    def test_it_finds_the_server_and_the_model_ready(self, server) -> None:
        for protocol in ("v1", "v2"):
            assert self.ask(server, protocol, "is_server_live")
            assert self.ask(server, protocol, "is_model_ready", "cifar10")
        assert self.ask(server, "v2", "is_server_ready")

    def test_its_v1_requests_are_answered(self, server) -> None:
        answer = self.ask(server, "v1", "infer", {"instances": [PIXELS.tolist()]}, model_name="cifar10")
        assert answer["model_name"] == "cifar10"
        assert len(answer["predictions"]) == 1

    @pytest.mark.parametrize("binary", [False, True])
    def test_its_v2_requests_are_answered(self, digest_and_server, binary) -> None:
        digest, server = digest_and_server
        images = TestTensors.IMAGES
        tensor = InferInput("images", list(images.shape), "UINT8")
        tensor.set_data_from_numpy(images, binary_data=binary)
        outputs = [RequestedOutput("probabilities", {"binary_data": binary}), RequestedOutput("logits")]
        request = InferRequest("cifar10", [tensor], request_outputs=outputs)
        answer = self.ask(server, "v2", "infer", request, model_name="cifar10")
        np.testing.assert_allclose(
            answer.get_output_by_name("probabilities").as_numpy(), expected_probabilities(PIXELS, SMOOTH), atol=1e-4
        )
        assert answer.get_output_by_name("logits").as_numpy().shape == (2, 10)
        assert answer.parameters["model_digest"] == digest

    def test_it_reads_our_errors(self, server) -> None:
        with pytest.raises(HTTPStatusError, match="instances: expected a value"):
            self.ask(server, "v1", "infer", {}, model_name="cifar10")


def test_non_finite_answer_is_a_server_error(tmp_path) -> None:
    """Black pictures, which the server tries before it serves, are answered soundly; white ones are not."""
    uri, digest = store_tiny_model(FolderStore(tmp_path / "models"), onnx_bytes=tiny_onnx(breaks_on_white=True))
    with run_server(uri, digest, tmp_path) as server:
        assert upload(server, encode(np.zeros((32, 32, 3), np.uint8))).status == 200
        answer = upload(server, encode(np.full((32, 32, 3), 255, np.uint8)))
        assert answer.status == 500
        assert "not finite" in answer.json["error"]
        assert "not finite" in server.log


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_every_address_of_both_families_can_be_served(tmp_path) -> None:
    uri, digest = store_tiny_model(FolderStore(tmp_path / "models"))
    with run_server(uri, digest, tmp_path, "--host", "::") as server:
        for host in ("127.0.0.1", "[::1]"):
            assert InferenceClient(f"http://{host}:{server.port}", timeout=300).served_model().model_digest == digest
