"""Whether the panel keeps up with a hand: sixty moves of its slider a second, in a real browser.

    python benchmarks/panel.py
    python benchmarks/panel.py --rounds 10 --model demo

A JupyterLab of its own shows the panel; the context slider is moved sixty times in a second, five times the
range there and back. Milliseconds on the clock, of the page:

move      from a move to the end of what the page does about it
frame     between two frames while the slider moves; 16.7 is a frame a second sixty times
drawn     from the last move to the frame that shows it
exact     from the last move to llama.cpp's own number on the page, the kernel's and the child's work included
asked     questions that the kernel got for the sixty-one moves
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _support import about, show

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.lab import open_lab

if TYPE_CHECKING:
    from support.lab import Tab

PANEL = "import nbinfer as nb\npanel = nb.panel()\npanel"
# Moves the slider, and notes when it moved, when frames were drawn, and when the exact number was there.
DRAG = """async target => {
  const root = document.querySelector('.nbinfer-w');
  const slider = root.querySelector('input[type=range]'), most = Number(slider.max);
  const moves = [], frames = [];
  let going = true;
  const tick = now => { frames.push(now); if (going) requestAnimationFrame(tick); };
  requestAnimationFrame(tick);
  const began = performance.now();
  for (let i = 0; i <= 60; i++) {
    const wait = began + i * 1000 / 60 - performance.now();
    if (wait > 0) await new Promise(done => setTimeout(done, wait));
    const way = (i / 6) % 2, at = i === 60 ? target : Math.round(most * (way <= 1 ? way : 2 - way));
    slider.value = at;
    const before = performance.now();
    slider.dispatchEvent(new Event('input', { bubbles: true }));
    moves.push(performance.now() - before);
  }
  const last = performance.now();
  await new Promise(requestAnimationFrame);
  const drawn = performance.now() - last;
  going = false;
  const settled = () => [...root.querySelectorAll('.nbinfer-w-note')]
    .some(node => node.textContent === "exact: llama.cpp's own plan");
  while (!settled()) {
    if (performance.now() - last > 20000) throw new Error('no exact number');
    await new Promise(done => setTimeout(done, 2));
  }
  const gaps = frames.slice(1).map((at, i) => at - frames[i]);
  return { moves, gaps, drawn, exact: performance.now() - last };
}"""
ASKED = "print('asked', panel.watched._newest_plan)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="a model of the panel's list")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="nbinfer-panel-"))
    try:
        with open_lab(home) as lab:
            lab.write("panel.ipynb", PANEL, ASKED)
            with lab.tab("panel.ipynb", width=1100, height=1500) as tab:
                rows = measure(tab, options.model, options.rounds)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    show(
        f"Sixty moves of the slider a second, {options.model}, milliseconds",
        list(rows[0]),
        [list(row.values()) for row in rows],
        notes=[about("anywidget", "jupyterlab")],
        target=options.json,
    )


def measure(tab: Tab, model: str, rounds: int) -> list[dict[str, Any]]:
    page = tab.page
    tab.run(0)
    page.get_by_role("button", name=f"Plan {model}", exact=True).press("Enter")
    page.get_by_text("exact: llama.cpp's own plan", exact=True).wait_for()
    rows: list[dict[str, Any]] = []
    before = asked(tab)
    for number in range(1, rounds + 1):
        page.wait_for_timeout(500)
        # Another end each time: a number that is on the page already would be no answer.
        seen = page.evaluate(DRAG, 1 + number % 2)
        now = asked(tab)
        rows.append(
            {
                "round": number,
                "move, median": statistics.median(seen["moves"]),
                "move, most": max(seen["moves"]),
                "frame, median": statistics.median(seen["gaps"]),
                "frame, most": max(seen["gaps"]),
                "drawn": seen["drawn"],
                "exact": seen["exact"],
                "asked": now - before,
            }
        )
        before = now
    return rows


def asked(tab: Tab) -> int:
    """How many plans the kernel was asked for so far."""
    tab.run(1)
    tab.page.wait_for_timeout(500)
    output = tab.page.locator(".jp-OutputArea-output").filter(has_text="asked").last
    output.wait_for()
    return int(output.inner_text().split()[1])


if __name__ == "__main__":
    main()
