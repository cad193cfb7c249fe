"""The GPU: `make gpu` and its parts."""
