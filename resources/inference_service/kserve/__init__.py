"""KServe InferenceServices of the model server, and the parts they are made of. See docs/kserve.md.

`config`, `manifest`, `pods` and `diagnosis` are pure; `client`, `tunnel`, `endpoint` and `rollout` know no Dagster;
`resource` does.
"""
