"""Training: a recipe, the loop that follows it, and the folder in which a run lives."""
