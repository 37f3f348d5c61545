"""kdpipe: knowledge distillation experiments that can be believed."""

from importlib.metadata import version

__version__ = version("kdpipe")
