"""Runs to folders as the Hugging Face Hub holds them."""
