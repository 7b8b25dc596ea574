"""From a search file to everything that a search needs, opened and checked before anything expensive."""
