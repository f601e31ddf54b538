"""Tests of models in ONNX."""
