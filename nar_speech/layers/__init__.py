"""Network blocks, one kind per file."""
