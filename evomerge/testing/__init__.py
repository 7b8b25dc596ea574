"""Shared by tests of this project and of packages that extend it: the contract of each part, and tiny models."""

import sys

if (pytest := sys.modules.get("pytest")) is not None:  # benchmarks import some of it without pytest
    # Otherwise a failing contract says only "AssertionError". By name, because this module is already imported.
    parts = ("evaluators", "leases", "methods", "optimizers", "steps", "store_fixtures", "stores")
    pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in parts))
