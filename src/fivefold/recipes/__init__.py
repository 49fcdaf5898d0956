"""Shipped recipes: one TOML file a system."""
