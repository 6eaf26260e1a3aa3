"""What can be done to documents: one module per family of steps."""
