"""What this kernel holds: loaded models, the default one, and how a request is made and run.

``asking`` makes a request of what was written; ``model`` runs it, and ``streams`` and ``chat`` are what comes
back. ``held`` is the one session; ``plans`` decides what a load does, and ``loading`` does it. ``calls`` find
their model by themselves; ``recording`` and ``log`` keep what was asked; ``reports`` are the tables.
"""

from __future__ import annotations

from nbinfer.session.asking import IMAGE_OPTIONS, OPTIONS, Prepared, prepare, prepare_images, with_images
from nbinfer.session.calls import ainfer, generate_image, get, infer, loaded, stream, unload
from nbinfer.session.chat import Chat
from nbinfer.session.held import Running, Session, Settings, session, settings
from nbinfer.session.loading import dry_run, load, pull
from nbinfer.session.log import history
from nbinfer.session.model import Model
from nbinfer.session.plans import LoadPlan
from nbinfer.session.reports import doctor, models, ps, status
from nbinfer.session.streams import ImageStream, TextStream

__all__ = [
    "IMAGE_OPTIONS",
    "OPTIONS",
    "Chat",
    "ImageStream",
    "LoadPlan",
    "Model",
    "Prepared",
    "Running",
    "Session",
    "Settings",
    "TextStream",
    "ainfer",
    "doctor",
    "dry_run",
    "generate_image",
    "get",
    "history",
    "infer",
    "load",
    "loaded",
    "models",
    "prepare",
    "prepare_images",
    "ps",
    "pull",
    "session",
    "settings",
    "status",
    "stream",
    "unload",
    "with_images",
]
