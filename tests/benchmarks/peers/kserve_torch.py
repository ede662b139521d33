"""kserve's model server with eager torch, V1 JSON."""

import base64

import numpy as np
from kserve import Model, ModelServer
from model import PORT, TorchModel, pixels


class Classifier(Model):
    def __init__(self) -> None:
        super().__init__("cifar10")
        self.model = TorchModel()
        self.ready = True

    def predict(self, payload: dict, headers: dict | None = None, response_headers: dict | None = None) -> dict:
        images = np.stack([pixels(base64.b64decode(instance["b64"])) for instance in payload["instances"]])
        return {"predictions": self.model(images).tolist()}


ModelServer(http_port=PORT, enable_grpc=False, access_log_format=None).start([Classifier()])
