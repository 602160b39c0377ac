"""Checks of what users pass (values, parameters of a model), and warnings."""
