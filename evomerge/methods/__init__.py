"""The merge methods of this project, one per file: the equation and everything else known about the method.

Nothing here imports torch before a tensor is computed, because search files are checked against these methods.
"""
