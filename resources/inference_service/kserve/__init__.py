"""KServe InferenceServices of the model server. See docs/kserve.md."""
