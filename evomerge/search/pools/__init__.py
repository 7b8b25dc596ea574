"""Pools run jobs: in this process, on Ray workers, or on a simulated clock."""
