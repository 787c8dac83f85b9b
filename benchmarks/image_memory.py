"""What image pipelines take, estimated from headers and measured.

``python benchmarks/image_memory.py`` builds the denoisers and the VAE of well-known pipelines without their
weights (torch's fake tensors, which have shapes and no data), counts what one step and one decoding allocate,
and prints it beside the estimate. With ``--real FOLDER SIZE`` it loads a pipeline in a process of its own and
prints the resident memory beside the estimate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.gguf.pipeline import Component, PipelineHeader, read_pipeline
from nbinfer.memory.images import estimate_images, stage_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {
    "sample_size": 128,
    "num_layers": 2,  # of 24: each block frees what it took
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "out_channels": 16,
}
FLUX = {"num_layers": 1, "num_single_layers": 2}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def _key(tensor: Any) -> int:
    """Return what tells a tensor's memory from that of others, as long as it lives."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - torch has no public name for it


def peak_bytes(module: Any, call: Callable[[], Any]) -> int:
    """Return the bytes of tensors that a call holds at most, the module's own weights aside."""
    import torch
    from torch.utils import _pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    class Peak(TorchDispatchMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.now = self.most = 0
            self.seen = {_key(t) for t in [*module.parameters(), *module.buffers()]}

        def _gone(self, key: int, size: int) -> None:
            self.now -= size
            self.seen.discard(key)

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            out = function(*args, **(kwargs or {}))
            for tensor in _pytree.tree_leaves(out):
                if not isinstance(tensor, torch.Tensor):
                    continue
                storage, key = tensor.untyped_storage(), _key(tensor)
                if key not in self.seen:
                    size = storage.nbytes()
                    self.seen.add(key)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, key, size)
            return out

    with torch.no_grad(), Peak() as counted:
        call()
    return int(counted.most)


def measured_stages(folder: Path, size: tuple[int, int], *, batch: int = 1) -> dict[str, int]:
    """Return the bytes of tensors of one guided step and of one decoding of a real pipeline."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(str(folder), subfolder="unet")
    vae: Any = AutoencoderKL.from_pretrained(str(folder), subfolder="vae")
    scale = read_pipeline(folder).vae_scale
    cells = (size[1] // scale, size[0] // scale)
    noise = torch.zeros(2 * batch, unet.config.in_channels, *cells)
    words = torch.zeros(2 * batch, 77, unet.config.cross_attention_dim)
    latents = torch.zeros(batch, vae.config.latent_channels, *cells)
    return {
        "step": peak_bytes(unet, lambda: unet(noise, 1, encoder_hidden_states=words, return_dict=False)),
        "decode": peak_bytes(vae, lambda: vae.decode(latents, return_dict=False)),
    }


def _header(name: str, config: dict[str, Any], text: tuple[int, ...] = (77,)) -> PipelineHeader:
    plain = json.loads(json.dumps(config))
    parts = {name: Component(name, "diffusers", "", plain)}
    parts["vae"] = Component("vae", "diffusers", "AutoencoderKL", json.loads(json.dumps(VAE)))
    from nbinfer.gguf.header import TensorInfo

    one = (TensorInfo("x", (1,), "F32", 0, 4),)
    for i, tokens in enumerate(text):
        key = f"text_encoder_{i}"
        parts[key] = Component(key, "transformers", "", {"max_position_embeddings": tokens}, one)
    return PipelineHeader("", {"_class_name": "X"}, parts, 0)


def _step(what: str, module: Any, cells: int) -> Callable[[], Any]:
    """Return one step of a denoiser: of one image with guidance, where its pipeline uses any."""
    import torch

    empty = torch.empty
    if what.startswith("SD 3"):
        return partial(
            module,
            hidden_states=empty(2, 16, cells, cells),
            encoder_hidden_states=empty(2, 333, 4096),
            pooled_projections=empty(2, 2048),
            timestep=torch.ones(2),
        )
    if what.startswith("FLUX"):
        return partial(
            module,
            hidden_states=empty(1, cells**2 // 4, 64),
            encoder_hidden_states=empty(1, 512, 4096),
            pooled_projections=empty(1, 768),
            timestep=torch.ones(1),
            img_ids=empty(cells**2 // 4, 3),
            txt_ids=empty(512, 3),
        )
    more: dict[str, Any] = {}
    if what.startswith("SDXL"):
        more["added_cond_kwargs"] = {"text_embeds": empty(2, 1280), "time_ids": empty(2, 6)}
    words = empty(2, 77, 2048 if more else 768)
    return partial(module, empty(2, 4, cells, cells), 1, encoder_hidden_states=words, **more)


def fakes() -> list[dict[str, Any]]:
    """Return estimate and count of well-known denoisers and their VAE, one image."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FluxTransformer2DModel,
        SD3Transformer2DModel,
        UNet2DConditionModel,
    )
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows: list[dict[str, Any]] = []

    def row(what: str, side: int, found: int, estimated: int) -> None:
        counted = {"counted_mib": found / 2**20, "estimate_mib": estimated / 2**20}
        rows.append({"part": what, "size": side, **counted, "ratio": estimated / found})

    with FakeTensorMode(allow_non_fake_inputs=True):
        models: dict[str, tuple[Any, PipelineHeader]] = {
            "SD 1.5 step": (UNet2DConditionModel(**SD15), _header("unet", {**_UNET, **SD15})),
            "SDXL step": (UNet2DConditionModel(**SDXL), _header("unet", {**_UNET, **SDXL})),
            "SD 3 step": (
                SD3Transformer2DModel(**SD3),
                _header("transformer", {**SD3, "patch_size": 2}, (333,)),
            ),
            "FLUX.1 step": (
                FluxTransformer2DModel(**FLUX),
                _header(
                    "transformer", {**FLUX, "num_attention_heads": 24, "attention_head_dim": 128}, (512,)
                ),
            ),
        }
        for side in (512, 1024):
            cells = side // 8
            for what, (module, header) in models.items():
                guided = not what.startswith("FLUX")
                estimated = stage_bytes(header, (side, side), guided=guided)["step"]
                row(what, side, peak_bytes(module.eval(), _step(what, module, cells)), estimated)
            vae: Any = AutoencoderKL(**VAE).eval()
            latents = torch.empty(1, 4, cells, cells)
            estimated = stage_bytes(models["SD 1.5 step"][1], (side, side))["decode"]
            row("SD VAE decode", side, peak_bytes(vae, partial(vae.decode, latents)), estimated)
    return rows


_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "layers_per_block": 2,
}

_CHILD = """
import json, resource, sys, psutil
from pathlib import Path
bare = psutil.Process().memory_info().rss
from nbinfer.engines.diffusers import open_engine
from nbinfer.contract.requests import ImageRequest
engine = open_engine(Path(sys.argv[1]), threads=1)
loaded = psutil.Process().memory_info().rss
engine.submit(ImageRequest(prompt="a red fish", size=sys.argv[2], steps=2, seed=1)).result()
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"loaded": loaded - bare, "most": most - bare}))
"""


def real(folder: Path, size: str) -> dict[str, Any]:
    """Return the resident memory that a pipeline takes in a process of its own, and the estimate."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), size], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    made = estimate_images(folder, size=size, device="cpu")
    return {
        "size": size,
        "measured_mib": found["most"] / 2**20,
        "estimate_mib": made.required.ram / 2**20,
        "least_mib": (made.ram.known + made.ram.overhead[0]) / 2**20,
        "most_mib": (made.ram.known + made.ram.overhead[1]) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", nargs="+", metavar=("FOLDER", "SIZE"))
    asked = parser.parse_args()
    import pandas as pd

    if asked.real:
        folder, *sizes = asked.real
        rows = [real(Path(folder), size) for size in sizes or ["64x64"]]
    else:
        rows = fakes()
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
