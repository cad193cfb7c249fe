"""Pruning a checkpoint that need not fit in memory: a layer at a time, from its shards into the output's."""

from .prune import check_text, prune_checkpoint

__all__ = ["check_text", "prune_checkpoint"]
