"""The model server that a pod and the local deployment run. No dagster, no torch."""
