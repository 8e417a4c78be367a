"""Training recipes: one file a model, run as ``python -m recipes.NAME CONFIG.yaml key=value ...``."""
