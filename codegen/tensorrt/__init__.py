"""The TensorRT backend: the ONNX graph of a step, built into an engine for NVIDIA GPUs."""
