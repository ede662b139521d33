"""KServe InferenceServices of the model server, and the parts they are made of. See docs/kserve.md.

`config`, `manifest`, `pods`, `settled` and `diagnosis` are pure; `client`, `tunnel`, `endpoint`, `watch`, `canary` and
`deployer` know no Dagster; `resource` does.
"""
