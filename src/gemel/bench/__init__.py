"""Measured against planned, in the same units."""
