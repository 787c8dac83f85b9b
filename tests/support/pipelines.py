"""Image pipelines as files: the right shape on disk, with too few weights to run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from pathlib import Path

SD15: dict[str, Any] = {
    "unet": {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    },
    "vae": {"block_out_channels": [128, 256, 512, 512], "force_upcast": True},
}
"""Configurations of the parts of Stable Diffusion 1.5."""

_TINY: dict[str, Any] = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    },
    "vae": {"block_out_channels": [8, 16, 16, 32]},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 77},
}


def write_pipeline(folder: Path, **parts: dict[str, Any]) -> Path:
    """Write a ``StableDiffusionPipeline`` of 1,800 numbers; ``parts`` are other configurations."""
    configs = {**_TINY, **parts}
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    weights: dict[str, Any] = {
        "unet/diffusion_pytorch_model": np.zeros(1000, np.float32),
        "text_encoder/model": np.zeros(600, np.float16),
        "vae/diffusion_pytorch_model": np.zeros(200, np.float32),
    }
    texts = {
        "model_index.json": json.dumps(index),
        "scheduler/scheduler_config.json": json.dumps({"steps_offset": 1}),
        "tokenizer/tokenizer_config.json": "{}",
        **{f"{name}/config.json": json.dumps(config) for name, config in configs.items()},
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, numbers in weights.items():
        save_file({"weight": numbers}, folder / f"{name}.safetensors")
    return folder
