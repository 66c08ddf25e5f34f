"""State space models for continuous neural fields. Rooms are imported on first use."""

from importlib import import_module

__version__ = "0.1.0"
_ROOMS = "checkpoint classical evaluate flow graphs images kernels metrics models plots run samplers".split()
_ROOMS += "spectrograms train widgets".split()
__all__ = ["__version__", "directional_scan", "selective_scan", *_ROOMS]


def __getattr__(name):
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name in ("directional_scan", "selective_scan"):
        return getattr(import_module(f"{__name__}.kernels"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
