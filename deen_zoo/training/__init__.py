"""Recipes, losses, the training loop, and the reproduction of a paper's numbers."""
