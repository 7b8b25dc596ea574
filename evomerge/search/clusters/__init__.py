"""Machines: how they are started, join a cluster and are named."""
