"""Optimizers against one another at equal time, on five tasks: `python -m benchmarks.race --help`."""
