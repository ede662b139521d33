"""What works with any custom resource shares: asking the API server, reading pods and their logs, names and labels.

`naming`, `labels`, `pods`, `limits` and `diagnosis` are pure; `config` and `steps` know Dagster. A kind of object adds
its client and status, a `Launcher`, a `Watcher`, and advice for each cause of a failure.
"""
