"""Recipes, data and the training loop; needs accelerate and datasets."""
