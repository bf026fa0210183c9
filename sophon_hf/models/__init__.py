"""Load a model, and find its parts."""
