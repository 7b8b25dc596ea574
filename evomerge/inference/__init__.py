"""Engines: what answers prompts and finds likelihoods with a model that is there. They know no items and no scores."""
