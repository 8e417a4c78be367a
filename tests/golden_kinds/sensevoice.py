"""Handlers of recorded cases: kind -> function from a case to its checks."""

HANDLERS: dict = {}
