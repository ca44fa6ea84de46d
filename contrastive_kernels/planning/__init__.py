"""What would run: plans, explanations, measured tiles."""
