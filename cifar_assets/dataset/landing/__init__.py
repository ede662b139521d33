"""Processing of user data under `landing/`."""
