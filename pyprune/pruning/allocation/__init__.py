"""How many neurons each layer keeps. One way a file."""
