"""Recipes: models as data, one kind per file. They hold no tensors and open no files."""
