"""Export to ONNX, clean the graph, and count what is in it."""
