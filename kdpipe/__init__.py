"""kdpipe: knowledge distillation experiments that can be believed.

In Python: `distill` teaches any `nn.Module` on several seeds and judges it, `fit` trains one, `evaluate` examines one,
`load` opens the network of a finished run, `compare_runs` compares finished runs, and `kdpipe.losses` has the methods.
Importing kdpipe imports none of them: each comes when it is asked for.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdpipe.compare import compare_runs
    from kdpipe.library import Result, distill, evaluate, fit, load

__version__ = version("kdpipe")
__all__ = ["Result", "compare_runs", "distill", "evaluate", "fit", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("kdpipe.compare" if name == "compare_runs" else "kdpipe.library"), name)
    raise AttributeError(f"module 'kdpipe' has no attribute {name!r}")
