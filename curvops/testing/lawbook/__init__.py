"""What must be true of every operator, one module per kind of law."""
