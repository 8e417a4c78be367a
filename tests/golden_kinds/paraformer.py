"""Golden handlers of the system 'paraformer'."""

HANDLERS = {}
