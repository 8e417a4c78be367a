"""Task objects: what turns inputs of one task into results."""
