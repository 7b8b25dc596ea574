"""Search spaces: one a file. A new one is a file here, or an entry point ``evomerge.search_spaces`` of a package."""
