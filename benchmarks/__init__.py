"""Benchmarks of Fivefold's speed: `python -m benchmarks --help`."""
