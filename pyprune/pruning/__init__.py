"""The verb `prune` and its parts: what is measured, what is removed, how the rest is repaired."""
