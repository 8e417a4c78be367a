"""One file per system: ``HANDLERS = {kind: function(case) -> iterator of Check}``."""
