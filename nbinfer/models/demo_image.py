"""``demo-image``: a complete image pipeline with random weights, made on first use by diffusers' own classes.

It draws coloured patterns, not what it is asked for; everything else about it is as with a real one: the
classes, the files, the steps, and that the same prompt and seed give the same picture.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import ModelNotFound
from nbinfer.models.cache import cache_dir, made_once
from nbinfer.models.hushed import hushed

if TYPE_CHECKING:
    from pathlib import Path

NAME = "demo-image"
_INDEX = "model_index.json"
# Part of the folder's name: raise it when the pipeline changes.
_RECIPE = 1
_SEED = 20
_LOCK_SECONDS = 120.0
# Bytes as characters, as CLIP's tokenizer writes them: a vocabulary that can spell anything.
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,!?'-:;"


def demo_image_folder() -> Path:
    """Return where the pipeline lies, or will; makes nothing."""
    return cache_dir("models") / f"{NAME}-{_RECIPE}"


def demo_image_path() -> Path:
    """Return the folder of the image pipeline ``demo-image`` (2 MB), made on first use in a second or two.

    Raises
    ------
    ModelNotFound
        diffusers, whose classes it is made of, is not installed.
    ModelLoadError
        The cache folder cannot be written.
    """
    folder = demo_image_folder()
    if not (folder / _INDEX).exists() and find_spec("diffusers") is None:
        raise ModelNotFound(
            f"{NAME} is made of diffusers' own classes, and diffusers is not installed.\n"
            "Install it with: pip install 'nbinfer[images]'"
        )
    return made_once(folder, make_pipeline, name=NAME, timeout=_LOCK_SECONDS, proof=_INDEX)


def make_pipeline(folder: Path, *, seed: int = _SEED) -> None:
    """Write a small ``StableDiffusionPipeline`` with random weights: 64x64 pixels, 470,000 parameters.

    Parameters
    ----------
    folder
        Where to; made.
    seed
        Of the weights. The random numbers of this process stay what they are.
    """
    import torch

    with torch.random.fork_rng(devices=[]), hushed():
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(seed)
        tokenizer = _tokenizer(folder)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                # CLIP's own start is so narrow that every prompt would come out the same.
                initializer_factor=20.0,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 16, 32),
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.2,
        )
        with torch.no_grad():
            for name, weights in unet.named_parameters():
                # Random attention averages the prompt away; its words are to show.
                if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
                    weights.mul_(6.0)
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)


def _tokenizer(folder: Path) -> Any:
    """Return a CLIP tokenizer that spells: one token for each letter, within a word and at its end."""
    from transformers import CLIPTokenizer

    words = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    place = folder / "tokenizer"
    place.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    (place / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (place / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(place), model_max_length=77)
