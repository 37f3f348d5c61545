"""The formats of an export, and the files in its folder."""

from kdpipe.settings.addresses import WEIGHTS

ONNX, INT8, PROGRAM, CARD = "model.onnx", "model_int8.onnx", "model.pt2", "README.md"
FORMATS = {"onnx": (ONNX, INT8), "torch_export": (PROGRAM,), "safetensors": (WEIGHTS,)}
