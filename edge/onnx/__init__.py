"""Models as ONNX graphs: made from GGUF files, run by onnxruntime's execution providers."""
