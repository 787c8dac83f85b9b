"""The widgets' module on a plain page, with a model of the page's side only: no Jupyter, no kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbinfer.widgets

STATIC = Path(nbinfer.widgets.__file__).parent / "static"

# What anywidget hands to a module, kept in the page: `sent` is what the kernel would hear.
_MODEL = """
async ([source, css, state]) => {
  const style = document.createElement('style');
  style.textContent = css;
  document.head.append(style);
  const listeners = {};
  window.model = {
    sent: [],
    get: name => state[name],
    set: (name, value) => { state[name] = value; (listeners['change:' + name] ?? []).forEach(f => f()); },
    on: (event, f) => (listeners[event] ??= []).push(f),
    off: (event, f) => { listeners[event] = (listeners[event] ?? []).filter(g => g !== f); },
    send: content => window.model.sent.push(content),
    listening: () => Object.values(listeners).reduce((n, l) => n + l.length, 0),
  };
  const url = URL.createObjectURL(new Blob([source], { type: 'text/javascript' }));
  const widget = (await import(url)).default;
  window.close_widget = widget.render({ model: window.model, el: document.querySelector('main') });
}
"""

_HTML = """<!doctype html><html lang="en"><head><title>widget</title></head>
<body data-jp-theme-light="{light}" style="background:{back};margin:16px">
<main><h1 style="font-size:0;margin:0">widget</h1></main></body></html>"""

# What JupyterLab's dark theme sets.
DARK = (
    ":root { --jp-layout-color1: #212121; --jp-ui-font-color1: rgba(255, 255, 255, 1);"
    " --jp-code-font-family: monospace; }"
)


def draw(page: Any, kind: str, parts: dict[str, Any], *, dark: bool = False) -> None:
    """Draw a widget of ``kind`` with this state into an empty page."""
    light = "false" if dark else "true"
    page.set_content(_HTML.format(back="#111" if dark else "#fff", light=light))
    css = (DARK if dark else "") + (STATIC / "widgets.css").read_text()
    state = json.loads(json.dumps({**parts, "kind": kind}))
    page.evaluate(_MODEL, [(STATIC / "widgets.js").read_text(), css, state])


def put(page: Any, **parts: Any) -> None:
    """Change parts of the state, as the kernel does."""
    for name, value in parts.items():
        page.evaluate("([name, value]) => window.model.set(name, value)", [name, value])


def sent(page: Any, what: str) -> list[dict[str, Any]]:
    """Return the commands of a kind that the page has sent."""
    commands: list[dict[str, Any]] = page.evaluate("() => window.model.sent")
    return [command for command in commands if command["do"] == what]
