"""The verbs of `gemel`, imported one at a time."""
