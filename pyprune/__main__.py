"""`python -m pyprune VERB ...`, as the command `pyprune`."""

from .cli import main

if __name__ == "__main__":
    main()
