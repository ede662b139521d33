"""The model server, run by a pod or by the local deployment. No dagster, no torch."""
