"""FFNs that run fast: `PrunedMLP`, the operators under it, and which backend computes them."""
