"""Measurements: commands that print and keep the numbers that the documents quote."""
