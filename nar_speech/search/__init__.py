"""Decoding: tensors in, token sequences out; no module here knows a network."""
