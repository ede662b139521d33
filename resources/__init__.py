"""Configurable Dagster resources: each system the graph talks to, with its local twin beside it."""
