"""Edits, and the only code that changes weights."""
