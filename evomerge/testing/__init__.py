"""What tests of this project and of packages beside it share: the contract of each part, and tiny models."""

import sys

if (pytest := sys.modules.get("pytest")) is not None:  # benchmarks import some of it, and run without
    # Else a contract that fails says "AssertionError" and no values. By name: this module itself is imported by now.
    parts = ("evaluators", "leases", "methods", "optimizers", "steps", "store_fixtures", "stores")
    pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in parts))
