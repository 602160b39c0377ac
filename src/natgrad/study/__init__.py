"""Optimizers x tasks x seeds: what `natgrad study` runs, keeps and compares."""
