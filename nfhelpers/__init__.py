"""State space models for continuous neural fields. Public names are imported on first use.

`import nfhelpers` loads nothing but this file: it needs neither torch, triton, mamba_ssm nor a GPU.
"""

from importlib import import_module

__version__ = "0.1.0"

_ROOMS = (
    "evaluate",
    "flow",
    "images",
    "kernels",
    "metrics",
    "models",
    "plots",
    "run",
    "samplers",
    "spectrograms",
    "train",
    "widgets",
)
_FUNCTIONS = {"directional_scan": "kernels", "selective_scan": "kernels"}  # name -> the room it lives in

__all__ = ["__version__", *_ROOMS, *_FUNCTIONS]


def __getattr__(name):
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; public names are {', '.join(__all__)}"
    )


def __dir__():
    return sorted({*globals(), *__all__})
