"""Quantrack: quantize YOLO detectors to low bits, and prove the result."""

__version__ = "0.2.0"
