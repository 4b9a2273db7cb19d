"""Offline, iterative preference tuning for fashion image diffusion models. Importing this loads nothing heavy."""

__version__ = "0.1.0"
