"""Audit of training data: labels and images that a person should look at."""
