"""A text VAE whose Transformer encoder is pruned while it trains."""
