"""Pruned checkpoints where models are served: exports for engines, and a plugin for one of them."""
