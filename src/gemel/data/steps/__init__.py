"""What happens to documents: one module per kind of step, each a class that takes its own configuration."""
