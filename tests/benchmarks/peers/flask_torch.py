"""What the replaced pipeline's kind of server does: Flask's own server, eager torch."""

import logging

import numpy as np
from flask import Flask, request
from model import PORT, TorchModel, pixels
from werkzeug.serving import WSGIRequestHandler

app = Flask(__name__)
model = TorchModel()


@app.post("/predict")
def predict() -> dict[str, list[list[float]]]:
    return {"predictions": model(np.stack([pixels(request.files["image"].read())])).tolist()}


logging.getLogger("werkzeug").disabled = True
WSGIRequestHandler.protocol_version = "HTTP/1.1"  # connections stay open
app.run("127.0.0.1", PORT, threaded=True)
