"""Quantize a detector: a recipe is a list of steps, each in a file of its own."""
