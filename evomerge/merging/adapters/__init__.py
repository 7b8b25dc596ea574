"""Weighted sums of adapters, beside the weights of their base."""
