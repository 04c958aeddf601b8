"""Erasing rows: where they lie, removing them, and the receipt."""
