"""The tables of README and of the documents, and figures, from results."""
