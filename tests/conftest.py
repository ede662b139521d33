"""What several kinds of tests share."""

pytest_plugins = ["tests.fixtures.minio", "tests.fixtures.workspace"]
