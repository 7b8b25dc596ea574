"""One candidate on one live model: written, checked, scored."""
