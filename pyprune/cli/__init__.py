"""The command line: `pyprune VERB ...`, a file for each verb."""


def main() -> None:
    """Entry point of the command `pyprune`; the verbs are imported here, so that `screen` alone costs little."""
    from .commands import main

    main()
