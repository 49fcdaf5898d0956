"""Rows divided into folds, and the table of them."""
