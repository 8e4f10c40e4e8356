"""A benchmark for defenses of and against diffusion models: defense x attack x metric grids, run and ranked."""

__version__ = "0.1.0"
