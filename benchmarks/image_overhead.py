"""Images through nbinfer beside bare diffusers: the same pipeline, steps, sizes and seeds, in turns.

Prints the processor time of each side per round and their ratio (bare over nbinfer: 1 is no overhead), and
stops when a picture differs. The pipeline has random weights; speed does not depend on what they say.
"""

from __future__ import annotations

import argparse
import io
import time
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=4)
    asked = parser.parse_args()
    import torch
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    from nbinfer.contract.requests import ImageRequest, parse_size
    from nbinfer.engines.diffusers import open_engine
    from nbinfer.engines.diffusers.loading import choose_device
    from nbinfer.models.demo_image import demo_image_path

    folder = demo_image_path()
    width, height = parse_size(asked.size)
    device, dtype = choose_device()
    engine = open_engine(folder, threads=1)
    bare: Any = StableDiffusionPipeline.from_pretrained(str(folder), dtype=getattr(torch, dtype)).to(device)
    bare.set_progress_bar_config(disable=True)

    def plain() -> list[bytes]:
        found = []
        for seed in range(asked.images):
            generator = torch.Generator("cpu").manual_seed(seed)
            made = bare(
                "a red fish",
                num_inference_steps=asked.steps,
                width=width,
                height=height,
                generator=generator,
            ).images[0]
            made.save(io.BytesIO(), "PNG")
            found.append(made.tobytes())
        return found

    def ours() -> list[bytes]:
        request = ImageRequest(
            prompt="a red fish", size=(width, height), n=asked.images, steps=asked.steps, seed=0
        )
        made = engine.submit(request).result()
        return [Image.open(io.BytesIO(image.png)).tobytes() for image in made.images]

    def timed(side: Callable[[], list[bytes]]) -> tuple[float, list[bytes]]:
        began = time.process_time()
        found = side()
        return time.process_time() - began, found

    plain(), ours()
    ratios = []
    for number in range(asked.rounds):
        sides = (plain, ours) if number % 2 == 0 else (ours, plain)
        found = {side: timed(side) for side in sides}
        if found[plain][1] != found[ours][1]:
            raise SystemExit("the two sides made different pictures")
        ratios.append(found[plain][0] / found[ours][0])
        print(
            f"round {number}: bare {found[plain][0]:.2f} s, nbinfer {found[ours][0]:.2f} s, {ratios[-1]:.3f}"
        )
    print(f"median ratio {median(ratios):.3f} on {device} in {dtype}")
    engine.close()


if __name__ == "__main__":
    main()
