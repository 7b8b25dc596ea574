"""Weighted sums of adapters, computed beside the weights of their base."""
