"""Count how often the demo chat model's greedy answer is exactly the expected one, for each kind of question.

    python tools/evaluate_chat.py                          # the model that ships
    python tools/evaluate_chat.py OUT/tiny-chat-f16.gguf --count 500 --misses 10

Questions are drawn from the corpus with a seed of their own. Stories are free, so hardly ever exact.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

from chat_corpus import END, conversation, question_and_answer

from nbinfer import session
from nbinfer.models.demo import demo_path


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate the demo chat model.")
    parser.add_argument("model", type=Path, nargs="?", default=demo_path(), help="a GGUF file")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--misses", type=int, default=0, help="print so many wrong answers")
    options = parser.parse_args()

    model = session.load(str(options.model), threads=options.threads)
    rng = random.Random(options.seed)
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    misses = options.misses
    for _ in range(options.count):
        talk = conversation(rng)
        prompt, expected = question_and_answer(talk)
        answer = model.infer(prompt, raw=True, temperature=0, max_tokens=120, stop=[END]).text
        asked[talk.kind] += 1
        right[talk.kind] += answer == expected
        if answer != expected and talk.kind != "story" and misses > 0:
            misses -= 1
            print(f"{talk.kind}: {talk.turns[-2][1]!r}\n  answered {answer!r}\n  expected {expected!r}")
    model.unload()

    for kind in sorted(asked):
        print(f"{kind:12s} {right[kind]:4d} of {asked[kind]}")
    print(f"{'all':12s} {right.total():4d} of {asked.total()}")


if __name__ == "__main__":
    main()
