"""From a search file to all that a search needs, opened and checked before the first expensive second."""
