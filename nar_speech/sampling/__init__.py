"""Sampling of tokens by masked models: one loop, its schedules, its rules; no model is imported here."""
