"""The stages of a recipe: training, pruning, quantization."""
