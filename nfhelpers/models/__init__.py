"""Models: velocity fields over sparse pixels, of grids and of latents. `load_model` opens any saved one.

Letters of shapes: B batch; I observed points, Q queries, L tokens of a scan (I, then Q); D width of a model,
E of a scan, N states a channel, R rank of its step size; K directions; H heads of C channels; F frequencies.
In `diffae` C channels of the latent; in `local_mamba` M is the width of the condition.
"""
# ruff: noqa: F401

import json
from pathlib import Path

from nfhelpers.files import config_of
from nfhelpers.models.base import FieldModel, ModelConfig, evaluation_mode
from nfhelpers.models.diffae import (
    LatentVelocityNetwork,
    LatentVelocityNetworkConfig,
    MambaDiffusionAutoencoder,
    MambaDiffusionAutoencoderConfig,
    fit_latent_statistics,
    fit_linear_code,
    second_phase,
)
from nfhelpers.models.field import MambaField, MambaFieldConfig
from nfhelpers.models.local_mamba import LocalMamba2D, LocalMamba2DConfig
from nfhelpers.models.sparse_fields import (
    MambaDiffusion,
    MambaDiffusionConfig,
    MambaDiffusionV2,
    MambaDiffusionV2Config,
    MultiDirectionalMambaDiffusion,
    MultiDirectionalMambaDiffusionConfig,
    initialise_from_v1,
)

FIELD_MODELS: dict[str, tuple[type[FieldModel], type[ModelConfig]]] = {
    "v1": (MambaDiffusion, MambaDiffusionConfig),
    "multidir": (MultiDirectionalMambaDiffusion, MultiDirectionalMambaDiffusionConfig),
    "v2": (MambaDiffusionV2, MambaDiffusionV2Config),
    "field": (MambaField, MambaFieldConfig),
    "diffae": (MambaDiffusionAutoencoder, MambaDiffusionAutoencoderConfig),
}  # models of sparse fields, by their type

OTHER_MODELS: dict[str, tuple[type[FieldModel], type[ModelConfig]]] = {
    "latent_flow": (LatentVelocityNetwork, LatentVelocityNetworkConfig),
    "localmamba": (LocalMamba2D, LocalMamba2DConfig),
}  # models of latents and of grids, by their type


def load_model(folder: str | Path) -> FieldModel:
    """Open a folder written by `save_pretrained`, whichever model it holds: in eval mode, on the CPU."""
    path, known = config_of(folder), FIELD_MODELS | OTHER_MODELS
    try:
        model, _ = known[json.loads(path.read_text())["model_type"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} names no model_type of {sorted(known)}: {error!r}") from error
    return model.from_pretrained(folder)
