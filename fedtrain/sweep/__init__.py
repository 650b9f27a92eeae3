"""Sweeps: many runs of one experiment file, over a grid of values or as an Optuna study."""
