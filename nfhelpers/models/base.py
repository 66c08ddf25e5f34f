"""What every model has in common: a strict config, stacks of layers, config.json + model.safetensors."""

import json
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from nfhelpers.files import plain

WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of the models' settings. Unknown keys and values of another type are errors."""

    model_type: ClassVar[str] = ""

    def __post_init__(self):
        for field in fields(self):
            value = plain(getattr(self, field.name))
            value = tuple(value) if isinstance(value, list) else value  # JSON and TOML have lists
            object.__setattr__(self, field.name, value)
            legal = (int, float) if field.type is float else (field.type,)
            if field.type in (bool, int, float, str) and type(value) not in legal:
                raise ValueError(f"{field.name}={value!r} is not of type {field.type.__name__}")

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "ModelConfig":
        """Build from a mapping such as a parsed config.json."""
        settings = dict(settings)
        if settings.pop("model_type", cls.model_type) != cls.model_type:
            raise ValueError(f"these are not settings of a {cls.model_type!r} model: {settings}")
        legal = {field.name for field in fields(cls)}
        if unknown := sorted(set(settings) - legal):
            raise ValueError(f"unknown {cls.__name__} keys {unknown}; legal keys are {sorted(legal)}")
        return cls(**settings)


class Layers(nn.ModuleList):
    """Layers applied one after the other, each to the tokens and the same context.

    With `recompute` they keep nothing for the backward pass but their inputs (Chen et al. 2016).
    """

    recompute = False

    def forward(self, tokens, *context):
        for layer in self:
            tokens = self.apply_layer(layer, tokens, *context)
        return tokens

    def apply_layer(self, layer, tokens, *context):
        if self.recompute and self.training:
            return checkpoint(layer, tokens, *context, use_reentrant=False)
        return layer(tokens, *context)


@contextmanager
def evaluation_mode(model):
    """model.eval() inside; afterwards each submodule is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class FieldModel(nn.Module, PyTorchModelHubMixin):
    """Base of the models: `save_pretrained(folder)`, `from_pretrained(folder or hub id)` in eval mode; for
    a folder `models.load_model` never asks the hub. Weights are safetensors, all of them must be there, and
    they load as float32. Launching takes longer than computing in a `launch_bound` class: CUDA graphs help.
    """

    launch_bound: ClassVar[bool] = False

    @property
    def gradient_checkpointing(self):
        """Whether training recomputes the layers in the backward pass: less memory, a third more time."""
        return any(part.recompute for part in self.modules() if isinstance(part, Layers))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled):
        for part in self.modules():
            if isinstance(part, Layers):
                part.recompute = enabled

    def _save_pretrained(self, save_directory):
        settings = {"model_type": self.config.model_type, **asdict(self.config)}
        (save_directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, save_directory / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def _decode_arg(cls, expected_type, value):
        return expected_type.from_dict(value)  # strict; the mixin's own ignores unknown keys

    @classmethod
    def _from_pretrained(cls, *, model_id, config=None, **hub):
        folder, name = Path(model_id), "model.safetensors"
        path = folder / name if folder.is_dir() else Path(hf_hub_download(model_id, name, **hub))
        if config is None or not path.exists():
            raise ValueError(f"{model_id!r} has no config.json or no {name}")
        model = cls(config)
        try:  # without what DataParallel and torch.compile put before names
            weights = {WRAPPERS.sub("", name): tensor for name, tensor in load_file(path).items()}
            model.load_state_dict(weights)
        except Exception as error:
            raise ValueError(f"{str(path)!r} is damaged or of another model: {error}") from error
        return model.eval()
