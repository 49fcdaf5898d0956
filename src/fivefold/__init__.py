"""Fivefold: k-fold image classification as container jobs."""

__version__ = "0.1.0"
