"""Models: velocity fields over sparse pixels. `load_model(folder)` opens any saved one."""

import json
from pathlib import Path

from nfhelpers.models.base import FieldModel, ModelConfig
from nfhelpers.models.sparse_fields import (
    LocalImplicitField,
    LocalImplicitFieldConfig,
    MambaDiffusion,
    MambaDiffusionConfig,
    MambaDiffusionV2,
    MambaDiffusionV2Config,
    MambaField,
    MambaFieldConfig,
    MultiDirectionalMambaDiffusion,
    MultiDirectionalMambaDiffusionConfig,
    initialise_from_v1,
)

__all__ = [
    "FIELD_MODELS",
    "FieldModel",
    "LocalImplicitField",
    "LocalImplicitFieldConfig",
    "MambaDiffusion",
    "MambaDiffusionConfig",
    "MambaDiffusionV2",
    "MambaDiffusionV2Config",
    "MambaField",
    "MambaFieldConfig",
    "ModelConfig",
    "MultiDirectionalMambaDiffusion",
    "MultiDirectionalMambaDiffusionConfig",
    "initialise_from_v1",
    "load_model",
]

FIELD_MODELS: dict[str, tuple[type[FieldModel], type[ModelConfig]]] = {
    config.model_type: (model, config)
    for model, config in (
        (MambaDiffusion, MambaDiffusionConfig),
        (MultiDirectionalMambaDiffusion, MultiDirectionalMambaDiffusionConfig),
        (MambaDiffusionV2, MambaDiffusionV2Config),
        (MambaField, MambaFieldConfig),
        (LocalImplicitField, LocalImplicitFieldConfig),
    )
}


def load_model(folder: str | Path) -> FieldModel:
    """Open a folder written by `save_pretrained`, whichever model it holds: in eval mode, on the CPU.

    Raises ValueError when the folder holds no config.json, naming the models in its subfolders if there are
    any (a training run has best/ and latest/), or an unknown model_type.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        inside = sorted(str(found.parent) for found in Path(folder).glob("*/config.json"))
        if inside:
            raise ValueError(
                f"{str(folder)!r} is not itself a saved model, but holds {inside}; pass one of them"
            )
        raise ValueError(
            f"{str(folder)!r} holds no config.json; pass a saved model such as 'checkpoints/v1-photos'"
        )
    model_type = json.loads(path.read_text()).get("model_type")
    if model_type not in FIELD_MODELS:
        raise ValueError(f"{path} has model_type={model_type!r}; legal types are {sorted(FIELD_MODELS)}")
    model, _ = FIELD_MODELS[model_type]
    return model.from_pretrained(folder)
