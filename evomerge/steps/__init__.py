"""Steps after a merge method, one per file; see ``evomerge.step``."""
