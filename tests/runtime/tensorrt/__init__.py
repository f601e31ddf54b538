"""The executor of TensorRT, over a recorded API whose engines onnxruntime computes."""
