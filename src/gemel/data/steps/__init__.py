"""What a pipeline does to documents, one kind of step a module."""
