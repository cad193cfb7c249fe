"""What answers a question once."""
