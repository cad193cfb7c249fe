"""Which model types of Transformers pyprune takes: tiny models of all of them, and what happens to each."""
