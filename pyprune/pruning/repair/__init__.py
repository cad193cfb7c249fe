"""What kept neurons take over from removed ones. One way a file."""
