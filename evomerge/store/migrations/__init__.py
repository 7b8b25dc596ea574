"""How stores of older programs become stores of this one: one file for each format, run by Alembic in its order."""
