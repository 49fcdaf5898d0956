"""Augmentations and resizing."""
