"""Engines, which answer prompts and compute likelihoods with an existing model. They know no items and no scores."""
