"""The formats of an export: the files in its folder, and how its table and its card name them."""

from kdpipe.settings.addresses import WEIGHTS

ONNX, INT8, PROGRAM, CARD = "model.onnx", "model_int8.onnx", "model.pt2", "README.md"
FORMATS = {"onnx": (ONNX, INT8), "torch_export": (PROGRAM,), "safetensors": (WEIGHTS,)}
LABELS = {ONNX: "student ONNX", INT8: "student int8", PROGRAM: "student torch.export"}
DESCRIPTIONS = {
    ONNX: "ONNX, float",
    INT8: "ONNX, 8-bit integers",
    PROGRAM: "torch.export (load such files only from sources that you trust)",
    WEIGHTS: "weights alone; config.yaml describes their network",
}
SUFFIXES = (".onnx", ".pt2", ".safetensors")  # of files that `kdpipe.predict` opens
