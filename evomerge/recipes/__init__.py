"""Recipes: models as data, of one kind a file. They hold no tensor and open no file."""
