"""8-bit ONNX files: onnxruntime's static quantization."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from kdpipe.export.writers import save_onnx
from kdpipe.settings.errors import flat
from kdpipe.system.silence import quiet

CALIBRATION_IMAGES = 500
CALIBRATION_BATCH = 50
# The network's own operators, not those of its preprocessing (Cast, Div, Sub, Resize). ReLU and Add are included
# because switching to float between convolutions is slower: 0.23 ms instead of 0.21 per image for a ResNet-20.
OPERATORS = ["Conv", "Gemm", "MatMul", "Relu", "Clip", "Add", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool"]


def write_int8(float_file: Path, file: Path, images: NDArray[np.uint8], metadata: dict[str, str]) -> None:
    """Quantize an exported ONNX file.

    Args:
        images: training images, uint8 [N, C, H, W], to calibrate the ranges of activations.

    Raises:
        ValueError: onnxruntime cannot quantize this network.
    """
    import onnx
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = (images[first : first + CALIBRATION_BATCH] for first in range(0, len(images), CALIBRATION_BATCH))

    class Batches(CalibrationDataReader):
        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            return next(({"images": batch} for batch in batches), None)

    onnxruntime.set_default_logger_severity(3)
    try:
        with TemporaryDirectory() as folder, quiet():
            prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
            # PyTorch's exporter has already stored all shapes.
            quant_pre_process(str(float_file), str(prepared), skip_symbolic_shape=True)
            quantize(
                str(prepared),
                str(quantized),
                Batches(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                op_types_to_quantize=OPERATORS,
                # Measured with a ResNet-20 on a CPU with AVX512-VNNI: unsigned activations with signed weights take
                # half the time of float, both signed more time than float, both unsigned as much as float.
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # Ranges from percentiles or entropy were no more accurate, and took five times as long.
                calibrate_method=CalibrationMethod.MinMax,
            )
            save_onnx(onnx.load(quantized), file, metadata)
    except Exception as error:  # of many kinds
        raise ValueError(f"onnxruntime cannot quantize it ({type(error).__name__}: {flat(error, 300)})") from error
