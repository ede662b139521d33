"""What people put under `landing/`."""
