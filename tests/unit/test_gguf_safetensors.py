"""Headers of safetensors models: read, or refused with the documented error."""

from __future__ import annotations

import functools
import json
import os
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file
from support.file_server import FileServer, ranges

from nbinfer.contract.errors import SafetensorsParseError
from nbinfer.contract.modes import Mode
from nbinfer.gguf.safetensors import parse_safetensors, read_remote_safetensors, read_safetensors
from nbinfer.gguf.source import MemorySource

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CASES = int(os.environ.get("NBINFER_FUZZ_CASES", "50000")) // 25

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def packed(table: Mapping[str, Any] | str | bytes, data: int | bytes = 0, length: int | None = None) -> bytes:
    raw = json.dumps(table) if isinstance(table, dict) else table
    raw = raw.encode() if isinstance(raw, str) else raw
    assert isinstance(raw, bytes)
    n = len(raw) if length is None else length
    return n.to_bytes(8, "little") + raw + (bytes(data) if isinstance(data, int) else data)


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24), **more: Any) -> dict[str, Any]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


def model(folder: Path, files: Mapping[str, bytes], config: Mapping[str, Any] | None = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_file_of_the_safetensors_package_is_read_as_it_was_written(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "a": np.zeros((3, 4), dtype=np.float32),
        "b": np.zeros((5,), dtype=np.float16),
        "c": np.zeros((), dtype=np.int64),
        "empty": np.zeros((0, 7), dtype=np.uint8),
    }
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "np"})
    header = read_safetensors(tmp_path)
    assert {t.name: (t.shape, t.type, t.n_bytes) for t in header.tensors} == {
        "a": ((3, 4), "F32", 48),
        "b": ((5,), "F16", 10),
        "c": ((), "I64", 8),
        "empty": ((0, 7), "U8", 0),
    }
    assert header.weights_bytes == 66
    assert header.parameters == 18
    assert header.config == {}


def test_the_configuration_answers_what_an_estimate_asks(tmp_path: Path) -> None:
    header = read_safetensors(model(tmp_path / "m", {"model.safetensors": packed(entry(), 24)}))
    assert header.architecture == "LlamaForCausalLM"
    assert (header.n_layers, header.n_vocab, header.context_length) == (4, 1024, 2048)
    assert header.quantisation.label == "F32"
    assert header.modes == (Mode.COMPLETION,)
    assert header.get("torch_dtype") == "bfloat16"


def test_the_language_model_of_a_vision_model_goes_first(tmp_path: Path) -> None:
    config = CONFIG | {
        "text_config": {"num_hidden_layers": 7},
        "quantization_config": {"quant_method": "awq"},
    }
    header = read_safetensors(model(tmp_path / "m", {"model.safetensors": packed(entry(), 24)}, config))
    assert header.n_layers == 7
    assert header.n_vocab == 1024
    assert header.quantisation.label == "awq"


@pytest.mark.parametrize(
    ("architecture", "modes"),
    [
        ("Qwen3ForCausalLM", (Mode.COMPLETION,)),
        ("Gemma3ForConditionalGeneration", (Mode.COMPLETION,)),
        ("XLMRobertaForSequenceClassification", (Mode.RERANKING,)),
        ("BertModel", (Mode.EMBEDDING,)),
        ("Unheard", ()),
    ],
)
def test_modes_follow_from_the_name_of_the_architecture(
    tmp_path: Path, architecture: str, modes: tuple[Mode, ...]
) -> None:
    config = {"architectures": [architecture]}
    assert read_safetensors(model(tmp_path / "m", {"model.safetensors": packed({})}, config)).modes == modes


def shards(second: str = "b.safetensors") -> dict[str, bytes]:
    index = {"weight_map": {"x": "a.safetensors", "y": second}}
    return {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "a.safetensors": packed({"x": entry()["t"]}, 24),
        "b.safetensors": packed({"y": entry()["t"]}, 24),
        "consolidated.safetensors": packed({"z": entry()["t"]}, 24),
    }


def test_an_index_says_which_files_belong_to_the_model(tmp_path: Path) -> None:
    header = read_safetensors(model(tmp_path / "m", shards()))
    assert header.files == ("a.safetensors", "b.safetensors")
    assert [(t.name, t.part) for t in header.tensors] == [("x", 0), ("y", 1)]


def test_a_model_on_a_server_is_read_without_its_weights(tmp_path: Path) -> None:
    files = shards() | {"config.json": json.dumps(CONFIG).encode()}
    served = {f"/repo/{name}": data for name, data in files.items()}
    here = read_safetensors(model(tmp_path / "m", files))
    with FileServer(served) as server:
        there = read_remote_safetensors(f"{server.address}/repo/")
    assert (there.tensors, there.config, there.file_size) == (here.tensors, here.config, here.file_size)

    weights = packed(entry(shape=(2, 10**12), offsets=(0, 8 * 10**12)))
    claims = functools.partial(ranges, size=len(weights) + 8 * 10**12)
    with FileServer({"/repo/model.safetensors": weights + bytes(2**21)}, claims) as server:
        there = read_remote_safetensors(f"{server.address}/repo")
    assert there.parameters == 2 * 10**12


@pytest.mark.parametrize(
    "strange", ["../b.safetensors", "/etc/b.safetensors", "b.bin", "C:b.safetensors", 3, None]
)
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, strange: Any) -> None:
    with pytest.raises(SafetensorsParseError, match="which is no safetensors file beside it"):
        read_safetensors(model(tmp_path / "m", shards(second=strange)))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes are no safetensors file"),
    "seven bytes": (bytes(7), "7 bytes are no safetensors file"),
    "no header": (bytes(8), "does not begin with a brace"),
    "header of 2**64-1 bytes": (
        packed("{}", length=2**64 - 1),
        "a header of 18,446,744,073,709,551,615 bytes",
    ),
    "header longer than the file": (packed("{}", length=3), "a header of 3 bytes is announced"),
    "header of spaces": (packed("   {}"), "does not begin with a brace"),
    "not JSON": (packed("{nope"), "no valid JSON"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "no valid JSON"),
    "nested without end": (packed('{"a":' * 100_000), "no valid JSON"),
    "a number of 5000 digits": (packed('{"a":' + "9" * 5000 + "}"), "no valid JSON"),
    "a name twice": (packed('{"t": 1, "t": 2}'), "'t' appears twice"),
    "a tensor that is a number": (packed({"t": 1}), "has other fields than"),
    "a field too many": (packed(entry(more=1), 24), "has other fields than"),
    "unknown dtype": (packed(entry("F7"), 24), "unknown dtype 'F7'"),
    "dtype that is a list": (packed(entry(["F32"]), 24), "unknown dtype"),
    "negative dimension": (packed(entry(shape=[-2, -3]), 24), "no counts"),
    "dimension that is true": (packed(entry(shape=[True, 6]), 24), "no counts"),
    "dimension of 2**70": (packed(entry(shape=[2**70]), 24), "no counts"),
    "a thousand dimensions": (packed(entry(shape=[1] * 1000), 24), "no counts"),
    "one offset": (packed(entry(offsets=[0]), 24), "no counts"),
    "offsets backwards": (packed(entry(offsets=[24, 0]), 24), "needs 24 bytes by its shape, and has -24"),
    "too few bytes": (packed(entry(offsets=[0, 20]), 20), "needs 24 bytes by its shape, and has 20"),
    "half a byte": (packed(entry("F4", shape=[3], offsets=[0, 1]), 1), "needs 1.5 bytes by its shape"),
    "a hole": (packed(entry(offsets=[8, 32]), 32), "begins at 8 instead of 0"),
    "overlap": (packed(entry() | {"u": entry()["t"]}, 24), "begins at 0 instead of 24"),
    "cut off": (packed(entry(), 10), "the file is cut off"),
    "bytes of no tensor": (packed(entry(), 30), "6 bytes belong to no tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_lying_file_is_refused_and_the_lie_is_named(tmp_path: Path, name: str) -> None:
    data, problem = HOSTILE[name]
    with pytest.raises(SafetensorsParseError) as caught:
        read_safetensors(model(tmp_path / "m", {"model.safetensors": data}))
    assert str(caught.value).startswith("failed to read safetensors: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, r"there is no model.safetensors, and no model.safetensors.index.json"),
        ({"model.safetensors.index.json": b"[]"}, "the JSON is no object"),
        ({"model.safetensors.index.json": b"{}"}, "has no weight_map"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'},
            "x.safetensors cannot be opened",
        ),
        ({"config.json": b"{" * 5000, "model.safetensors": packed({})}, "no valid JSON"),
        (
            {"config.json": b" " * (5 * 2**20), "model.safetensors": packed({})},
            "up to 4,194,304 are possible",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, files: dict[str, bytes], problem: str) -> None:
    with pytest.raises(SafetensorsParseError, match=problem):
        read_safetensors(model(tmp_path / "m", files, None))


@pytest.mark.fuzz
def test_what_is_accepted_is_what_the_safetensors_package_accepts(tmp_path: Path) -> None:
    rng = random.Random(0)
    base = packed(entry() | {"u": {"dtype": "F16", "shape": [2], "data_offsets": [24, 28]}}, 28)
    path = tmp_path / "model.safetensors"
    accepted = 0
    for _ in range(CASES):
        data = bytearray(base)
        for _ in range(rng.choice((1, 1, 2))):
            place = rng.randrange(len(data))
            action = rng.random()
            if action < 0.6:
                data[place] = rng.choice(b'0123456789{}[]":, -\x00\xffFUI')
            elif action < 0.8:
                del data[place]
            else:
                data.insert(place, rng.choice(b"0123456789 "))
        path.write_bytes(data)
        try:
            ours = {t.name: list(t.shape) for t in parse_safetensors(MemorySource(bytes(data)))}
        except SafetensorsParseError:
            continue
        accepted += 1
        with safetensors.safe_open(path, "numpy") as theirs:
            assert {name: theirs.get_slice(name).get_shape() for name in theirs.keys()} == ours  # noqa: SIM118
    assert accepted > CASES // 50
