"""Train the demo chat model, on the CPU, from the generated corpus.

    python tools/train_chat.py OUT --steps 2400 --threads 2          # about 12 minutes on two idle cores
    python tools/export_chat.py OUT                                  # then write the GGUF files

Needs torch 2.9 or newer and tokenizers (``pip install torch tokenizers``); nothing else in this project does.
OUT becomes a Hugging Face folder (config.json, model.safetensors, tokenizer.json) with training.json, the
record of how it was made. The run is bound by steps, not by time: the same options, thread count and torch
version give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chat_corpus import SPECIAL_TOKENS, conversation, render

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer
    from torch import Tensor

# How Qwen2's tokenizer cuts text before merging; llama.cpp knows it by name.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TOKENIZER_CONVERSATIONS = 20_000
CONVERSATIONS_PER_DRAW = 1_500
LONGEST = 512
WARMUP_STEPS = 40
# Prompts are predicted too, but little: a model this small should spend itself on the answers.
PROMPT_WEIGHT = 0.05


@dataclass(frozen=True)
class Shape:
    """The sizes of a llama-architecture model with tied embeddings."""

    vocabulary: int = 1024
    context: int = 1024
    hidden: int = 128
    layers: int = 4
    ffn: int = 384
    heads: int = 2
    kv_heads: int = 1
    head_size: int = 64  # 64, not 8 or 16: vLLM's attention on the CPU refuses smaller heads
    rms_eps: float = 1e-5
    rope_base: float = 10_000.0

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return each weight matrix's name, as Hugging Face spells it, and its shape (out, in)."""
        attention, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            shapes |= {
                layer + "self_attn.q_proj.weight": (attention, self.hidden),
                layer + "self_attn.k_proj.weight": (kv, self.hidden),
                layer + "self_attn.v_proj.weight": (kv, self.hidden),
                layer + "self_attn.o_proj.weight": (self.hidden, attention),
                layer + "mlp.gate_proj.weight": (self.ffn, self.hidden),
                layer + "mlp.up_proj.weight": (self.ffn, self.hidden),
                layer + "mlp.down_proj.weight": (self.hidden, self.ffn),
            }
        return shapes

    def norms(self) -> list[str]:
        """Return the names of the RMS norms' weights, each of shape (hidden,)."""
        names = [
            f"model.layers.{i}.{norm}.weight"
            for i in range(self.layers)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        return [*names, "model.norm.weight"]

    def config(self) -> dict[str, Any]:
        """Return the config.json of the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.rms_eps,
            "rope_theta": self.rope_base,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "torch_dtype": "float32",
            "initializer_range": 0.02,
        }


class Model:
    """The forward pass, over a dictionary of weights with Hugging Face's names."""

    def __init__(self, shape: Shape, seed: int) -> None:
        import torch

        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        self.weights: dict[str, Tensor] = {}
        for name, (rows, columns) in shape.matrices().items():
            if "embed" in name:
                std = 0.02
            else:
                std = 1 / math.sqrt(columns)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * shape.layers)
            self.weights[name] = (torch.randn(rows, columns, generator=generator) * std).requires_grad_()
        for name in shape.norms():
            self.weights[name] = torch.ones(shape.hidden, requires_grad=True)
        frequencies = 1 / shape.rope_base ** (torch.arange(0, shape.head_size, 2) / shape.head_size)
        angles = torch.outer(torch.arange(shape.context).float(), frequencies).repeat(1, 2)
        self._cos, self._sin = angles.cos(), angles.sin()

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the last hidden states, (batch, tokens, hidden), of token ids (batch, tokens)."""
        from torch.nn.functional import embedding, linear, silu

        w = self.weights
        x = embedding(tokens, w["model.embed_tokens.weight"])
        for i in range(self.shape.layers):
            layer = f"model.layers.{i}."
            x = x + self._attention(self._norm(x, layer + "input_layernorm"), layer + "self_attn.")
            y = self._norm(x, layer + "post_attention_layernorm")
            gate = silu(linear(y, w[layer + "mlp.gate_proj.weight"]))
            x = x + linear(
                gate * linear(y, w[layer + "mlp.up_proj.weight"]), w[layer + "mlp.down_proj.weight"]
            )
        return self._norm(x, "model.norm")

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits over the vocabulary, (…, vocabulary), of hidden states (…, hidden)."""
        return hidden @ self.weights["model.embed_tokens.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        from torch.nn.functional import rms_norm

        return rms_norm(x, (self.shape.hidden,), self.weights[name + ".weight"], self.shape.rms_eps)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        from torch.nn.functional import linear, scaled_dot_product_attention

        batch, length, _ = x.shape

        def project(which: str, heads: int) -> Tensor:
            y = linear(x, self.weights[f"{name}{which}_proj.weight"])
            return y.view(batch, length, heads, self.shape.head_size).transpose(1, 2)

        query = self._rotate(project("q", self.shape.heads))
        key = self._rotate(project("k", self.shape.kv_heads))
        value = project("v", self.shape.kv_heads)
        y = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return linear(y.transpose(1, 2).reshape(batch, length, -1), self.weights[name + "o_proj.weight"])

    def _rotate(self, x: Tensor) -> Tensor:
        import torch

        length, half = x.shape[2], self.shape.head_size // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * self._cos[:length] + turned * self._sin[:length]


def train_tokenizer(vocabulary: int, seed: int) -> Tokenizer:
    """Train a byte-level BPE on the corpus; ids 0, 1 and 2 are the special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(seed)

    def texts() -> Iterator[str]:
        for _ in range(TOKENIZER_CONVERSATIONS):
            text = "".join(piece for piece, _ in render(conversation(rng)))
            for token in SPECIAL_TOKENS:
                text = text.replace(token, "\n")
            yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def batches(tokenizer: Tokenizer, seed: int, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids and weights of the loss, both (conversations, longest), without end.

    Conversations of like length share a batch, so that little of it is padding (weight 0).
    """
    rng = random.Random(seed)
    while True:
        encoded = []
        for _ in range(CONVERSATIONS_PER_DRAW):
            ids: list[int] = []
            weights: list[float] = []
            for text, is_answer in render(conversation(rng)):
                piece = tokenizer.encode(text).ids
                ids += piece
                weights += [1.0 if is_answer else PROMPT_WEIGHT] * len(piece)
            if len(ids) <= LONGEST:
                encoded.append((ids, weights))
        encoded.sort(key=lambda pair: len(pair[0]))
        drawn: list[list[tuple[list[int], list[float]]]] = [[]]
        for pair in encoded:
            # Sorted: the newest is the longest, and so the width of the batch.
            if drawn[-1] and (len(drawn[-1]) + 1) * len(pair[0]) > batch_tokens:
                drawn.append([])
            drawn[-1].append(pair)
        rng.shuffle(drawn)
        for group in drawn:
            yield _padded(group)


def _padded(group: list[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    import torch

    width = max(len(ids) for ids, _ in group)
    tokens = torch.zeros(len(group), width, dtype=torch.long)
    weights = torch.zeros(len(group), width)
    for row, (ids, wanted) in enumerate(group):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = torch.tensor(wanted)
    return tokens, weights


def rate(step: int, steps: int) -> float:
    """Return the learning rate's factor: a short rise, level for 60 % of the run, then down to 2 %."""
    done = step / steps
    fall = 1.0 if done < 0.6 else max(0.02, (1 - done) / 0.4)
    return min(1.0, (step + 1) / WARMUP_STEPS) * fall


def train(model: Model, tokenizer: Tokenizer, options: argparse.Namespace) -> dict[str, float]:
    """Train in place; returns what is worth recording."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils import clip_grad_norm_

    hidden_matrices = [w for name, w in model.weights.items() if w.dim() == 2 and "embed" not in name]
    others = [w for name, w in model.weights.items() if w.dim() == 1 or "embed" in name]
    # Muon learns the matrices several times faster here than AdamW does (Jordan et al. 2024).
    optimizers = [
        torch.optim.Muon(hidden_matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full_rates = [group["lr"] for group in groups]
    started, seen, average = time.monotonic(), 0, math.nan
    for step, (tokens, weights) in zip(
        range(options.steps), batches(tokenizer, options.seed + 1, options.batch_tokens), strict=False
    ):
        wanted = weights[:, 1:].reshape(-1)
        used = wanted > 0
        hidden = model.hidden(tokens[:, :-1]).reshape(-1, model.shape.hidden)[used]
        losses = cross_entropy(model.logits(hidden), tokens[:, 1:].reshape(-1)[used], reduction="none")
        loss = (losses * wanted[used]).sum() / wanted[used].sum()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_grad_norm_(list(model.weights.values()), 1.0)
        for group, full in zip(groups, full_rates, strict=True):
            group["lr"] = full * rate(step, options.steps)
        for optimizer in optimizers:
            optimizer.step()
        seen += int(used.sum())
        answers = losses.detach()[wanted[used] == 1].mean().item()
        average = answers if math.isnan(average) else 0.95 * average + 0.05 * answers
        if step % 100 == 99 or step + 1 == options.steps:
            speed = seen / (time.monotonic() - started)
            print(f"step {step + 1:5d}  loss on answers {average:.4f}  {speed:,.0f} tokens/s", flush=True)
    return {
        "tokens": seen,
        "final_answer_loss": round(average, 5),
        "seconds": round(time.monotonic() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo chat model.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, help="at most so many tokens a step, padding too"
    )
    parser.add_argument("--threads", type=int, default=2)
    for name in ("vocabulary", "hidden", "layers", "ffn", "heads", "kv_heads"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Shape(), name))
    options = parser.parse_args()
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError as problem:
        raise SystemExit(f"{problem}; training needs: pip install torch tokenizers safetensors") from None

    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer(options.vocabulary, options.seed)
    shape = Shape(
        vocabulary=tokenizer.get_vocab_size(),
        hidden=options.hidden,
        layers=options.layers,
        ffn=options.ffn,
        heads=options.heads,
        kv_heads=options.kv_heads,
    )
    model = Model(shape, options.seed)
    count = sum(w.numel() for w in model.weights.values())
    print(f"{count:,} parameters, a vocabulary of {shape.vocabulary}", flush=True)
    record = train(model, tokenizer, options)

    options.out.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().contiguous() for name, w in model.weights.items()}
    save_file(weights, options.out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(options.out / "tokenizer.json"))
    _write_json(options.out / "config.json", shape.config())
    made = {
        "steps": options.steps,
        "seed": options.seed,
        "batch_tokens": options.batch_tokens,
        "threads": options.threads,
        "torch": torch.__version__,
        "parameters": count,
        **asdict(shape),
        **record,
    }
    _write_json(options.out / "training.json", made)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
