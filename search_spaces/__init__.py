"""Search spaces, one per file. To add one, write a file here or declare an entry point ``evomerge.search_spaces``."""
