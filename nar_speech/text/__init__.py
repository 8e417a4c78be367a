"""Text: tokenizers, normalisers for scoring, and what turns recognised pieces into readable text."""
