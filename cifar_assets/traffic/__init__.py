"""What the model server records of its traffic, and how its drift is measured. No dagster."""
