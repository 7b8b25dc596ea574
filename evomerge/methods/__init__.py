"""This project's merge methods: one a file, its equation with all that is to be known of it.

Nothing here imports torch before a tensor is made: methods are looked up where a search file is checked.
"""
