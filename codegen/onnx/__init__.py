"""The ONNX backend: the step of a program as an ONNX model that onnxruntime runs."""
