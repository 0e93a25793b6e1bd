"""Run an ONNX file in ONNX Runtime: provider, latency, placement, parity."""
