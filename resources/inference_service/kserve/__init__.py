"""KServe InferenceServices of the model server. See docs/kserve.md.

`config` and `manifest` are pure; `client`, `endpoint`, `watch` and `deployer` do not import Dagster; `resource` does.
"""
