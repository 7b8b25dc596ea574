"""Steps after a merge method, one a file; see ``evomerge.step``."""
