"""A trained policy in an engine: the ONNX file, the network it holds, the decisions made of its numbers."""
