"""MLflow: where trainings are tracked and model versions are registered."""
