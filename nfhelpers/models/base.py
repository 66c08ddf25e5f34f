"""What every model has in common: a strict config, and saving as config.json + model.safetensors."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_layers(
    layers: Iterable[nn.Module], tokens: torch.Tensor, *context: Any, recompute: bool
) -> torch.Tensor:
    """Apply layers one after the other, each to the tokens and the same context.

    With `recompute` nothing inside a layer is kept for the backward pass (Chen et al. 2016).
    """
    for layer in layers:
        if recompute:
            tokens = checkpoint(layer, tokens, *context, use_reentrant=False)
        else:
            tokens = layer(tokens, *context)
    return tokens


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """model.eval() inside; afterwards each submodule is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class ModelConfig:
    """Base of the model configs: checks its subclasses share. Unknown keys are errors."""

    model_type: ClassVar[str] = ""

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "ModelConfig":
        """Build from a mapping such as a parsed config.json; raises ValueError on an unknown key."""
        if settings.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"this config is of model_type={settings['model_type']!r}, not {cls.model_type!r}"
            )
        legal = {field.name for field in fields(cls)}
        unknown = sorted(set(settings) - legal - {"model_type"})
        if unknown:
            raise ValueError(f"unknown {cls.__name__} keys {unknown}; legal keys are {sorted(legal)}")
        return cls(**{key: value for key, value in settings.items() if key in legal})

    def lists_to_tuples(self, *names: str) -> None:
        """Settings as JSON and TOML have them, to what a frozen config holds."""
        for name in names:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            kind = type(self).__dataclass_fields__[name].type
            if isinstance(value, bool) or not isinstance(value, kind | int) or not value > 0:
                raise ValueError(f"{name}={value!r} is not a positive {kind.__name__}; try 16")

    def check_flag(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is a {type(value).__name__}; pass True or False")

    def check_heads(self) -> None:
        if self.d_model % self.num_heads or self.d_model % 2:
            raise ValueError(
                f"d_model={self.d_model} must be even and divisible by num_heads={self.num_heads}; "
                "try d_model=256, num_heads=8"
            )

    def check_dropout(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is outside [0, 1); try 0.1")


class FieldModel(nn.Module, PyTorchModelHubMixin):
    """Base of the models: `save_pretrained(folder)` and `from_pretrained(folder or hub id)`, strictly.

    The hub mixin by itself ignores unknown config keys and missing weights, and falls back to pickled
    weights; here each of these is an error. Weights may lie in float16 or bfloat16 on disk; they load as
    float32. `gradient_checkpointing` trades compute for memory: blocks are recomputed in the
    backward pass. For a class that is `launch_bound`, the CPU takes longer to launch the short kernels of an
    evaluation than a GPU to run them: samplers record them as one (`samplers.launched_at_once`).
    """

    gradient_checkpointing: bool = False
    launch_bound: ClassVar[bool] = False

    @property
    def recompute(self) -> bool:
        """Whether layers are recomputed in the backward pass (`run_layers`)."""
        return self.gradient_checkpointing and self.training

    def _save_pretrained(self, save_directory: Path) -> None:
        settings = {"model_type": self.config.model_type, **asdict(self.config)}
        (save_directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, save_directory / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "FieldModel":
        """Open a folder written by `save_pretrained`, or a model of the Hugging Face hub by its name.

        `options` are those of `PyTorchModelHubMixin.from_pretrained`, such as revision. Raises ValueError for
        a path, as against a hub name, that is no folder: the hub is not asked for it.
        """
        name = str(pretrained_model_name_or_path)
        local = isinstance(pretrained_model_name_or_path, Path) or name.startswith(
            ("checkpoints/", "runs/", ".", "/", "~")
        )
        if local and not os.path.isdir(name):
            raise ValueError(
                f"{name!r} is not a folder; pass one written by save_pretrained, such as "
                "'checkpoints/v1-photos'"
            )
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _decode_arg(cls, expected_type: type, value: Any) -> Any:
        if isinstance(expected_type, type) and issubclass(expected_type, ModelConfig):
            return expected_type.from_dict(value)
        return super()._decode_arg(expected_type, value)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: ModelConfig | None = None,
    ) -> "FieldModel":
        if config is None:
            raise ValueError(f"{model_id!r} has no config.json; pass a folder written by save_pretrained")
        if os.path.isdir(model_id):
            path = Path(model_id) / "model.safetensors"
            if not path.exists():
                raise ValueError(
                    f"{model_id!r} has no model.safetensors; pass a folder written by save_pretrained"
                )
        else:
            path = hf_hub_download(
                repo_id=model_id,
                filename="model.safetensors",
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )
        model = cls(config)
        try:
            model.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{str(path)!r} is damaged or of another model: {reason}") from error
        return model.eval()
