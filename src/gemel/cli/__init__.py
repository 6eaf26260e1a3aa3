"""The `gemel` command: one module per verb, imported one at a time."""
