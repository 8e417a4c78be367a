"""Golden handlers of the system 'ctc'."""

HANDLERS = {}
