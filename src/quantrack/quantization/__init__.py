"""Quantize a detector: a recipe is a list of steps, each in a file of its own."""

import logging
import warnings

# Said when Brevitas is imported or traced, about what Quantrack does not use.
warnings.filterwarnings("ignore", message="fast_hadamard_transform package not found")
warnings.filterwarnings("ignore", message="Computing zero point of output accumulator")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
