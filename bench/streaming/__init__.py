"""Pruning from the disk: a checkpoint of any size made of random weights, runs under a memory limit, and kills."""
