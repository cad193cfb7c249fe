"""Models as they are: FFNs found by structure, changed in place, saved and loaded again."""
