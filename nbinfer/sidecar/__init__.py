"""Models outside the kernel: a service that all notebooks share, and a process for each model.

============  ==========================================================================================
client        what a kernel does: hold a model by an open stream, and get an engine that runs there
discovery     how kernels find the one service of this user, or start it
service       the service: loads on demand, passes requests on, goes when nobody needs it
loader        which models are loaded: within a budget of bytes, each once, the idle ones going first
runners       the processes behind models, as the service sees them
runner        such a process: an engine, and the OpenAI API over it
app           that API: chat, completions, embeddings, reranking, tokens, metrics
guard         who may connect, from where, and how much they may send
commands      `nbinfer serve`, `stop` and `ps`
============  ==========================================================================================

A kernel that dies, however it dies, closes its stream; a service that dies closes its runners' input. Nothing
here depends on a program getting the chance to tidy up.
"""

from __future__ import annotations
