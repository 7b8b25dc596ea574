"""Migrations of stores from older programs: one file for each format, run in order by Alembic."""
