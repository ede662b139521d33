"""What works with any custom resource shares: asking the API server, reading pods and their logs, names and labels.

`naming`, `labels`, `pods`, `limits` and `diagnosis` are pure; `config` and `interrupts` know Dagster.
"""
