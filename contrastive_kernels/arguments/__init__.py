"""What comes from the user: checks, reductions, indices."""
