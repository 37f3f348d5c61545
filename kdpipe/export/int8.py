"""An ONNX file in 8-bit integers: onnxruntime's static quantisation."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from kdpipe.export.formats import quiet, write_described

CALIBRATION = 500  # training images
BATCH = 50
# What networks are made of, and not what preprocesses (Cast, Div, Sub, Resize). ReLU and Add are among them because a
# network that changes to float between its convolutions is slower: of a ResNet-20, 0.23 ms instead of 0.21 a picture.
OPERATORS = ["Conv", "Gemm", "MatMul", "Relu", "Clip", "Add", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool"]


def write_int8(float_file: Path, file: Path, images: NDArray[np.uint8], said: dict[str, str]) -> None:
    """Quantise an exported ONNX file.

    Args:
        images: uint8 [N, C, H, W], training images, from which the ranges of what layers give are taken.

    Raises:
        ValueError: onnxruntime cannot quantise this network.
    """
    import onnx
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantise
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.first = 0

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            batch = images[self.first : self.first + BATCH]
            self.first += BATCH
            return {"images": batch} if len(batch) else None

    onnxruntime.set_default_logger_severity(3)
    try:
        with TemporaryDirectory() as folder, quiet():
            prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
            # PyTorch's exporter has written down all shapes.
            quant_pre_process(str(float_file), str(prepared), skip_symbolic_shape=True)
            quantise(
                str(prepared),
                str(quantised),
                Batches(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                op_types_to_quantize=OPERATORS,
                # Measured on a CPU with AVX512-VNNI, ResNet-20: unsigned activations with signed weights take half the
                # time of float, signed with signed more than float, unsigned with unsigned as long as float.
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # Ranges from percentiles or entropy were no more accurate, and took five times as long.
                calibrate_method=CalibrationMethod.MinMax,
            )
            write_described(onnx.load(quantised), file, said)
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"onnxruntime cannot quantise this network ({type(error).__name__}: {reason})") from error
