"""Numbers of a merge that are found by gradient descent."""
