"""What would run: plans, explanations, costs, measured tiles."""
