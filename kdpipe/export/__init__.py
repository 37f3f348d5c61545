"""Finished runs as files that others can use: ONNX (float and int8), torch.export, safetensors.

Every file takes raw uint8 images of any batch size and gives logits. It is held against the PyTorch network before it
is given out, and comes with a model card.
"""
