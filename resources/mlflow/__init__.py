"""MLflow, which tracks trainings and registers model versions."""
