"""Looking at models: their cost, and the paper's figures."""
