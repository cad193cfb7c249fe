"""FFNs and whole models, by what a user would do with them."""
