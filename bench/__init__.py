"""Benches and experiments; run from the checkout: `python -m bench.FOLDER.NAME`."""
