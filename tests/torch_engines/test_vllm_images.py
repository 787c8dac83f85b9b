"""Images in vLLM: a small vision model whose answers transformers gives too."""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from support.vllm_engine import SETTINGS, demo_hf, quietly

from nbinfer.contract.errors import RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nbinfer.engines.vllm.generate import CompletionEngine

pytestmark = pytest.mark.vllm

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = ("red", "blue", "green")


def make_vision_model(folder: Path) -> Path:
    """The chat demo behind an image encoder with random weights: pictures change what it says."""
    with quietly():
        import torch
        from transformers import (
            AutoModelForCausalLM,
            AutoTokenizer,
            Idefics3Config,
            Idefics3ForConditionalGeneration,
            Idefics3ImageProcessorPil,
            Idefics3Processor,
            LlamaConfig,
        )

        tokenizer = AutoTokenizer.from_pretrained(demo_hf())
        marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        chat = AutoModelForCausalLM.from_pretrained(demo_hf(), dtype="float32")
        text = LlamaConfig.from_pretrained(demo_hf())
        text.vocab_size = 1088
        vision = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 48,
            "patch_size": 8,
        }
        config = Idefics3Config(
            text_config=text,
            vision_config=vision,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            tie_word_embeddings=True,
            pad_token_id=0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            chat.resize_token_embeddings(text.vocab_size)
            model = Idefics3ForConditionalGeneration(config)
        model.model.text_model.load_state_dict(chat.model.state_dict())
        # As wide as the embeddings of words, or the text would not notice.
        model.model.connector.modality_projection.proj.weight.data *= 10
        model.save_pretrained(folder)
        whole = {"longest_edge": 48}
        images = Idefics3ImageProcessorPil(size=whole, max_image_size=whole, do_image_splitting=False)
        Idefics3Processor(images, tokenizer, image_seq_len=9, chat_template=TEMPLATE).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return folder


def picture(colour: str) -> bytes:
    from PIL import Image

    image = Image.new("RGB", (48, 48), colour)
    image.paste("white", (10, 10, 30, 30))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_model(tmp_path_factory.mktemp("vision") / "model")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[CompletionEngine]:
    from nbinfer.engines.vllm.generate import CompletionEngine
    from nbinfer.engines.vllm.kernel import open_engine

    made = open_engine(folder, mode=Mode.COMPLETION, name="vision", **SETTINGS)
    assert isinstance(made, CompletionEngine)
    yield made
    made.close()


def ask(engine: CompletionEngine, *images: bytes, **options: Any) -> Any:
    messages = ({"role": "user", "content": "What is this?"},)
    request = CompletionRequest(messages=messages, images=images, max_tokens=16, **options)
    return engine.submit(request).result(60)


def test_what_it_says_of_a_picture_is_what_transformers_says(engine: CompletionEngine, folder: Path) -> None:
    with quietly():
        import torch
        from PIL import Image
        from transformers import AutoProcessor, Idefics3ForConditionalGeneration

        model = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
        processor = AutoProcessor.from_pretrained(folder)
        expected = {}
        for colour in COLOURS:
            shown = Image.open(io.BytesIO(picture(colour)))
            given = processor(text=ask(engine, picture(colour)).prompt, images=shown, return_tensors="pt")
            with torch.no_grad():
                out = model.generate(**given, max_new_tokens=16, do_sample=False)
            n = given["input_ids"].shape[1]
            expected[colour] = (processor.decode(out[0, n:], skip_special_tokens=True), n)
    found = {colour: ask(engine, picture(colour)) for colour in COLOURS}
    assert {c: (r.text, r.usage.prompt_tokens) for c, r in found.items()} == expected
    assert len({result.text for result in found.values()}) == len(COLOURS)


def test_a_picture_inside_a_message_is_the_same(engine: CompletionEngine) -> None:
    url = f"data:image/png;base64,{base64.b64encode(picture('red')).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    request = CompletionRequest(messages=({"role": "user", "content": content},), max_tokens=16)
    assert engine.submit(request).result(60).text == ask(engine, picture("red")).text


def test_several_pictures_keep_their_order(engine: CompletionEngine) -> None:
    one, other = ask(engine, picture("red"), picture("blue")), ask(engine, picture("blue"), picture("red"))
    assert (
        one.usage.prompt_tokens == other.usage.prompt_tokens > ask(engine, picture("red")).usage.prompt_tokens
    )
    assert one.text != other.text


def test_text_alone_is_answered_as_by_the_chat_model(engine: CompletionEngine) -> None:
    question = ({"role": "user", "content": "What is the capital of France?"},)
    result = engine.submit(CompletionRequest(messages=question, max_tokens=20)).result(60)
    assert result.text == "The capital of France is Paris."


def test_pictures_that_cannot_be_read_are_refused(engine: CompletionEngine) -> None:
    with pytest.raises(RequestError, match="image 1 cannot be read"):
        ask(engine, picture("red"), b"no picture")
    with pytest.raises(RequestError, match="raw prompt"):
        engine.submit(CompletionRequest(prompt="x", images=(picture("red"),)))
    far = [{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}]
    with pytest.raises(RequestError, match="nothing is fetched"):
        engine.submit(CompletionRequest(messages=({"role": "user", "content": far},)))
