"""Finished runs as files that others can use: ONNX (float and int8), torch.export, safetensors.

Every file takes raw uint8 images in batches of any size and returns logits. It is checked against the PyTorch network,
and comes with a model card.
"""
