"""Models: velocity fields over sparse pixels, and of latents. `load_model(folder)` opens any saved one."""

import json
from pathlib import Path

from nfhelpers.models.base import FieldModel, ModelConfig
from nfhelpers.models.diffae import (
    LatentVelocityNetwork,
    LatentVelocityNetworkConfig,
    MambaDiffusionAutoencoder,
    MambaDiffusionAutoencoderConfig,
    MinimalLatentMamba,
    MinimalLatentMambaConfig,
    encode_dataset,
    fit_latent_statistics,
    fit_linear_code,
    second_phase,
)
from nfhelpers.models.local_mamba import LocalMamba2D, LocalMamba2DConfig
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
    "OTHER_MODELS",
    "LatentVelocityNetwork",
    "LatentVelocityNetworkConfig",
    "LocalImplicitField",
    "LocalImplicitFieldConfig",
    "LocalMamba2D",
    "LocalMamba2DConfig",
    "MambaDiffusion",
    "MambaDiffusionAutoencoder",
    "MambaDiffusionAutoencoderConfig",
    "MambaDiffusionConfig",
    "MambaDiffusionV2",
    "MambaDiffusionV2Config",
    "MambaField",
    "MambaFieldConfig",
    "MinimalLatentMamba",
    "MinimalLatentMambaConfig",
    "ModelConfig",
    "MultiDirectionalMambaDiffusion",
    "MultiDirectionalMambaDiffusionConfig",
    "encode_dataset",
    "fit_latent_statistics",
    "fit_linear_code",
    "initialise_from_v1",
    "load_model",
    "second_phase",
]

FIELD_MODELS: dict[str, tuple[type[FieldModel], type[ModelConfig]]] = {
    config.model_type: (model, config)
    for model, config in (
        (MambaDiffusion, MambaDiffusionConfig),
        (MultiDirectionalMambaDiffusion, MultiDirectionalMambaDiffusionConfig),
        (MambaDiffusionV2, MambaDiffusionV2Config),
        (MambaField, MambaFieldConfig),
        (LocalImplicitField, LocalImplicitFieldConfig),
        (MambaDiffusionAutoencoder, MambaDiffusionAutoencoderConfig),
        (MinimalLatentMamba, MinimalLatentMambaConfig),
    )
}
"""Models with the signature of sparse fields, by their type."""

OTHER_MODELS: dict[str, tuple[type[FieldModel], type[ModelConfig]]] = {
    LatentVelocityNetworkConfig.model_type: (LatentVelocityNetwork, LatentVelocityNetworkConfig),
    LocalMamba2DConfig.model_type: (LocalMamba2D, LocalMamba2DConfig),
}
"""Models with signatures of their own, by their type."""


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
    known = FIELD_MODELS | OTHER_MODELS
    if model_type not in known:
        raise ValueError(f"{path} has model_type={model_type!r}; legal types are {sorted(known)}")
    model, _ = known[model_type]
    return model.from_pretrained(folder)
