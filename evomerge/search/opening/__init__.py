"""A search in its folder: made once, opened again, held by one driver at a time, copied elsewhere."""
