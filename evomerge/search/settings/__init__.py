"""The search file, its sections, and the folder of a search; nothing here opens a model."""
