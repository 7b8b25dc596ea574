"""Numbers of a merge found by gradient descent."""
