"""FastAPI on uvicorn with httptools and uvloop, ONNX Runtime in the thread pool."""

import numpy as np
import uvicorn
from fastapi import FastAPI, UploadFile
from model import PORT, OnnxModel, pixels

app = FastAPI()
model = OnnxModel()


@app.post("/predict")
def predict(image: UploadFile) -> dict[str, list[list[float]]]:
    return {"predictions": model(np.stack([pixels(image.file.read())])).tolist()}


uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", access_log=False)
