"""What several kinds of tests share."""

pytest_plugins = ["tests.fixtures.workspace"]
