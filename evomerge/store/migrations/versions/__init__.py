"""One migration for each format of the store."""
