"""Model families, and a model as methods see it: its blocks, its numbers, its budget, its checkpoint."""
