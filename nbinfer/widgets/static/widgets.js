// The page's side of nbinfer's widgets: draws the state that Python sends, and sends back what was pressed.
// Everything that is shown is set as text, never as markup. Nodes are kept and changed, so that the focus stays.

const NO_WORD_MS = 5000; // without a beat of the kernel, it is gone
const NO_ACK_MS = 700; // without an answer to a press, the kernel is busy
const HERE_MS = 30000; // how often a view says that it is still there
let ids = 0;

const uid = (name) => `nbinfer-${name}-${++ids}`;

// What takes the focus keeps the notebook's own keys out: its shortcuts look at the focused node itself first.
const OWN_KEYS = new Set(["button", "input", "select", "summary"]);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  if (OWN_KEYS.has(tag) || "tabindex" in attributes) set(node, "data-lm-suppress-shortcuts", "true");
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else set(node, name, value);
  }
  node.append(...children);
  return node;
}

function set(node, name, value) {
  if (value === false || value === null || value === undefined) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value === true ? "" : String(value));
}

function say(node, text) {
  const words = String(text ?? "");
  if (node.textContent !== words) node.textContent = words;
}

const show = (node, visible) => { if (node.hidden === visible) node.hidden = !visible; };

// Give `parent` one child per row, in order: kept by key, made by make(row), brought up to date by child.update(row).
function keyed(parent, rows, key, make) {
  const known = new Map([...parent.children].map((child) => [child.nbinferKey, child]));
  let at = parent.firstElementChild;
  for (const row of rows) {
    const name = key(row);
    let child = known.get(name);
    known.delete(name);
    if (!child) {
      child = make(row);
      child.nbinferKey = name;
    }
    child.update(row);
    if (child === at) at = at.nextElementSibling;
    else parent.insertBefore(child, at);
  }
  for (const child of known.values()) child.remove();
}

function badge() {
  const node = el("span", { class: "nbinfer-w-badge" });
  node.update = (word, kind) => {
    say(node, word);
    set(node, "data-kind", kind);
  };
  return node;
}

function button(label, press, attributes = {}) {
  return el("button", { type: "button", onclick: press, ...attributes }, label);
}

function section(title, ...children) {
  const id = uid("title");
  return el("section", { "aria-labelledby": id }, el("div", { id, class: "nbinfer-w-title" }, title), ...children);
}

// A bar of one or more segments against a whole; its text says the same in words.
function bar() {
  const track = el("div", { class: "nbinfer-w-track", role: "meter", "aria-valuemin": 0 });
  const name = el("span", { class: "nbinfer-w-bar-name" });
  const words = el("span", { class: "nbinfer-w-bar-text" });
  const node = el("div", { class: "nbinfer-w-bar" }, name, track, words);
  node.update = (row) => {
    say(name, row.name);
    set(name, "title", row.name);
    say(words, row.text);
    set(track, "aria-label", row.name);
    set(track, "aria-valuetext", row.text);
    set(track, "aria-valuemax", row.total);
    set(track, "aria-valuenow", Math.min(row.total, row.used));
    set(node, "data-kind", row.kind);
    // What is more than there is makes the scale longer, with a mark where the room ends.
    const scale = Math.max(row.total, row.used, 1);
    const segments = row.segments ?? [{ key: "used", kind: "used", bytes: row.used }];
    const marks = row.used > row.total ? [{ key: "end", kind: "end", bytes: 0, at: row.total }] : [];
    keyed(track, [...segments, ...marks], (s) => s.key, () => {
      const piece = el("span");
      piece.update = (s) => {
        set(piece, "data-part", s.kind);
        if (s.at === undefined) piece.style.width = `${(100 * s.bytes) / scale}%`;
        else piece.style.left = `${(100 * s.at) / scale}%`;
      };
      return piece;
    });
  };
  return node;
}

// -- what talks to the kernel ---------------------------------------------------------------------------

function connection(model, root) {
  let n = 0, sent = 0, acked = true, lastBeat = Date.now(), alive = true, said = 0;
  const view = Math.random().toString(36).slice(2);
  const send = (command) => {
    try { model.send(command); } catch { /* the kernel is gone; the status line says so */ }
  };
  const here = () => { said = Date.now(); send({ do: "open", view }); };
  const gone = () => send({ do: "close", view });
  const listeners = [];
  const tell = () => listeners.forEach((listener) => listener());
  const link = {
    get alive() { return alive; },
    get blocked() { return !alive || model.get("kernel").blocked; },
    get text() {
      if (!alive) return "Not connected to a kernel: run the cell again.";
      if (!acked && Date.now() - sent > NO_ACK_MS)
        return "Waiting for the kernel: what you pressed takes effect when the running cell ends. ■ interrupts it.";
      return model.get("kernel").text;
    },
    listen: (listener) => listeners.push(listener),
    send(command) {
      sent = Date.now();
      acked = false;
      send({ ...command, n: ++n });
    },
  };
  const onKernel = () => {
    lastBeat = Date.now();
    alive = true;
    acked = model.get("kernel").ack >= n;
    tell();
  };
  model.on("change:kernel", onKernel);
  n = model.get("kernel").ack; // another view may have counted already
  const timer = setInterval(() => {
    if (alive && Date.now() - lastBeat > NO_WORD_MS) alive = false;
    // The kernel forgets a view that is silent, as that of a machine that slept: then it is told at once.
    if (Date.now() - said > (alive ? HERE_MS : NO_WORD_MS)) here();
    set(root, "data-alive", alive);
    tell();
  }, 500);
  addEventListener("pagehide", gone);
  addEventListener("pageshow", here);
  here();
  link.close = () => {
    clearInterval(timer);
    removeEventListener("pagehide", gone);
    removeEventListener("pageshow", here);
    model.off("change:kernel", onKernel);
    gone();
  };
  return link;
}

// -- the panel's parts ----------------------------------------------------------------------------------

function machineView(model) {
  const bars = el("div");
  const note = el("div", { class: "nbinfer-w-note" });
  const node = section("This machine", bars, note);
  const draw = () => {
    const { rows, text } = model.get("machine");
    keyed(bars, rows, (row) => row.key, bar);
    say(note, text);
    show(note, Boolean(text));
  };
  return { node, draw, on: ["machine"] };
}

function loadedView(model, link) {
  const list = el("ul", { class: "nbinfer-w-list" });
  const none = el("div", { class: "nbinfer-w-note" }, "Nothing is loaded.");
  const node = section("Loaded", list, none);
  const make = (first) => {
    const name = el("strong"), where = el("span"), facts = el("span", { class: "nbinfer-w-facts" });
    const context = el("div", { class: "nbinfer-w-track nbinfer-w-thin", role: "meter", "aria-valuemin": 0 }, el("span", { "data-part": "cache" }));
    const press = button("Unload", () => {
      press.disabled = true;
      link.send({ do: "unload", name: first.name });
    }, { "aria-label": `Unload ${first.name}` });
    const row = el("li", {}, el("div", { class: "nbinfer-w-main" }, name, " ", where, el("div", {}, facts), context), press);
    row.update = (m) => {
      press.disabled = false;
      say(name, m.name);
      say(where, [m.mode, m.where].filter(Boolean).join(" · "));
      say(facts, [m.queue, m.rate, m.context && `context ${m.context}`, m.memory, m.keep].filter(Boolean).join(" · "));
      show(context, m.context_used > 0);
      set(context, "aria-label", `context of ${m.name}`);
      set(context, "aria-valuetext", m.context);
      set(context, "aria-valuemax", m.context_size || 1);
      set(context, "aria-valuenow", m.context_used);
      context.firstElementChild.style.width = `${(100 * m.context_used) / (m.context_size || 1)}%`;
    };
    return row;
  };
  const draw = () => {
    const { rows } = model.get("loaded");
    keyed(list, rows, (row) => row.name, make);
    show(list, rows.length > 0);
    show(none, rows.length === 0);
  };
  // A message may be why a model that was to be unloaded is still here.
  return { node, draw, on: ["loaded", "messages"] };
}

function modelsView(model, link, choose) {
  const rows = el("tbody");
  const count = el("span", { class: "nbinfer-w-note", role: "status" });
  const filterId = uid("filter");
  const filter = el("input", { type: "search", id: filterId, placeholder: "name, source, quantisation…", oninput: () => draw() });
  const again = button("Look again", () => link.send({ do: "refresh" }));
  const head = el("tr", {}, ...["Model", "Source", "Size", "Fits here", ""].map((title) => title ? el("th", { scope: "col" }, title) : el("td")));
  const table = el("table", {}, el("thead", {}, head), rows);
  const scroll = el("div", { class: "nbinfer-w-scroll", role: "region", "aria-label": "Models on this disk", tabindex: 0 }, table);
  // Whatever else can be loaded: a file elsewhere, or a model that is not here yet.
  const otherId = uid("other");
  const planOther = () => { if (other.value.trim()) choose({ ref: other.value.trim() }); };
  const other = el("input", { type: "text", id: otherId, placeholder: "a file, hf:owner/name:Q4_K_M",
    spellcheck: "false", onkeydown: (event) => { if (event.key === "Enter") planOther(); } });
  const node = section("On this disk",
    el("div", { class: "nbinfer-w-row" }, el("label", { for: filterId }, "Filter"), filter, again, count), scroll,
    el("div", { class: "nbinfer-w-row" }, el("label", { for: otherId }, "Another"), other, button("See what it takes", planOther)));
  const make = (first) => {
    const name = el("span"), about = el("div", { class: "nbinfer-w-note" }), source = el("td"), size = el("td", { class: "nbinfer-w-number" }), verdict = badge();
    const pick = button("Plan", () => choose(first), { "aria-label": `Plan ${first.name}` });
    const row = el("tr", {}, el("th", { scope: "row" }, name, about), source, size, el("td", {}, verdict), el("td", {}, pick));
    row.update = (m) => {
      say(name, m.name);
      say(about, m.problem || m.about);
      say(source, m.source);
      say(size, m.size);
      verdict.update(m.problem ? "cannot be used" : m.verdict, m.problem ? "error" : m.kind);
      show(verdict, Boolean(m.problem || m.verdict));
      pick.disabled = Boolean(m.problem);
      const chosen = model.get("plan").ref === m.ref;
      set(row, "data-chosen", chosen || null);
      set(pick, "aria-pressed", chosen);
    };
    return row;
  };
  const draw = () => {
    const { rows: all, busy, text } = model.get("models");
    const wanted = filter.value.trim().toLowerCase().split(/\s+/);
    const some = all.filter((m) => {
      const words = `${m.name} ${m.source} ${m.about} ${m.verdict}`.toLowerCase();
      return wanted.every((word) => words.includes(word));
    });
    keyed(rows, some, (m) => m.ref, make);
    say(count, busy ? "looking…" : some.length < all.length ? `${some.length} of ${all.length} models` : text || "No models found.");
    show(scroll, some.length > 0);
    again.disabled = busy;
  };
  return { node, draw, on: ["models", "plan"] };
}

function planView(model, link, { load }) {
  let settings = {}, ref = "", wanted = "", seq = 0, flying = 0, waiting = false, frame = 0;
  const title = el("strong");
  const bars = el("div");
  const legend = el("ul", { class: "nbinfer-w-legend", "aria-label": "What the memory is for" });
  const verdict = badge();
  const sentence = el("span");
  const source = el("div", { class: "nbinfer-w-note" });
  const advice = el("div", { class: "nbinfer-w-row" });
  const fits = el("div", { class: "nbinfer-w-row" }, el("span", {}, "What fits:"), advice);
  const problem = el("div", { class: "nbinfer-w-problem", role: "alert" });
  const fields = el("div", { class: "nbinfer-w-fields" });
  const stops = () => model.get("plan").limits?.context ?? [];

  const slider = (label, key, format) => {
    const id = uid(key), words = el("output", { for: id });
    const input = el("input", { type: "range", id, min: 0, step: 1, oninput: () => change(key, input.toSetting(Number(input.value))) });
    const node = el("div", { class: "nbinfer-w-field" }, el("label", { for: id }, label), input, words);
    input.toSetting = (value) => value;
    return { node, input, put(value, max, shown) {
      set(input, "max", max);
      if (Number(input.value) !== value) input.value = value;
      set(input, "aria-valuetext", format(shown));
      say(words, format(shown));
    } };
  };
  const context = slider("Context", "context_size", (n) => `${Number(n ?? 0).toLocaleString("en-US")} tokens`);
  context.input.toSetting = (index) => stops()[index];
  const layers = slider("GPU layers", "gpu_layers", (n) => (n < 0 ? "all" : String(n)));
  const parallel = slider("At once", "parallel", (n) => (n ? `${n} request${n === 1 ? "" : "s"}` : "automatic"));
  parallel.input.toSetting = (index) => index || null;
  const kvId = uid("kv");
  const kv = el("select", { id: kvId, onchange: () => change("kv_type", kv.value) });
  const keepId = uid("keep");
  const keep = el("select", { id: keepId }, ...[["", "until unloaded"], ["5m", "5 minutes idle"], ["30m", "30 minutes idle"], ["2h", "2 hours idle"]]
    .map(([value, label]) => el("option", { value }, label)));
  const whereId = uid("where");
  const where = el("select", { id: whereId }, ...[["kernel", "this kernel"], ["sidecar", "the sidecar, shared, outlives it"]]
    .map(([value, label]) => el("option", { value }, label)));
  const kvField = el("div", { class: "nbinfer-w-field" }, el("label", { for: kvId }, "KV cache type"), kv);
  fields.append(context.node, kvField, layers.node, parallel.node);
  const go = button("Load", () => link.send({
    do: "load", ref, settings, where: where.value, keep_alive: keep.value, force: model.get("plan").verdict?.kind === "error",
  }), { class: "nbinfer-w-primary" });
  const progress = el("progress", { max: 1, "aria-label": "Loading" });
  const progressText = el("span", { role: "status" });
  const actions = el("div", { class: "nbinfer-w-row" }, go, el("label", { for: whereId }, "into"), where,
    el("label", { for: keepId }, "and keep it"), keep, progress, progressText);
  const body = el("div", {}, title, problem, bars, legend,
    el("div", { class: "nbinfer-w-verdict", role: "status" }, verdict, " ", sentence), source, fits, fields, ...(load ? [actions] : []));
  const hint = el("div", { class: "nbinfer-w-note", role: "status" });
  const node = section("Will it fit?", hint, body);

  // One question in the air at a time, the newest next: however fast a slider moves, the page does not wait.
  const ask = () => {
    if (flying && Date.now() - flying < 1000) { waiting = true; return; }
    flying = Date.now();
    waiting = false;
    link.send({ do: "plan", ref, settings, seq: ++seq });
  };
  const change = (key, value) => {
    settings = { ...settings, [key]: value };
    drawFields();
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => { drawCurve(); ask(); });
  };
  const choose = (row) => {
    ref = wanted = row.ref;
    settings = {};
    flying = 0;
    ask();
    draw(); // the answer may have to come from a server
  };

  const drawFields = () => {
    // What a model has not, such as the context of one that draws, has no field.
    const { limits = {} } = model.get("plan");
    const all = limits.context ?? [];
    show(context.node, all.length > 0);
    show(kvField, (limits.kv_types ?? []).length > 0);
    show(parallel.node, (limits.parallel ?? 16) > 0);
    const nearest = all.reduce((best, n, i) => (Math.abs(n - settings.context_size) < Math.abs(all[best] - settings.context_size) ? i : best), 0);
    context.put(nearest, Math.max(0, all.length - 1), settings.context_size);
    keyed(kv, (limits.kv_types ?? []).map((name) => ({ name })), (row) => row.name, () => {
      const option = el("option");
      option.update = (row) => { set(option, "value", row.name); say(option, row.name); };
      return option;
    });
    if (settings.kv_type && kv.value !== settings.kv_type) kv.value = settings.kv_type;
    const most = limits.layers ?? 0;
    show(layers.node, most > 0);
    if (most) layers.put(settings.gpu_layers < 0 ? most : settings.gpu_layers ?? most, most, settings.gpu_layers ?? most);
    parallel.put(settings.parallel ?? 0, limits.parallel ?? 16, settings.parallel ?? 0);
  };
  const drawBars = (rows, segments) => {
    keyed(bars, rows, (row) => row.key, bar);
    if (segments) keyed(legend, segments, (row) => row.key, () => {
      const mark = el("span", { class: "nbinfer-w-swatch", "aria-hidden": "true" }), words = el("span");
      const item = el("li", {}, mark, words);
      item.update = (row) => { set(mark, "data-part", row.kind); say(words, row.text); };
      return item;
    });
  };
  // Between two answers the bars follow the slider by themselves: the kernel sent the whole curve over the context.
  const drawCurve = () => {
    const { of, rows } = model.get("curve");
    const index = stops().indexOf(settings.context_size);
    const same = of.ref === ref && ["kv_type", "gpu_layers", "parallel"].every((key) => settings[key] === of[key]);
    if (!same || !rows[index]) return;
    drawBars(rows[index], null);
    say(source, "by formula; the exact number follows");
  };
  const draw = () => {
    const plan = model.get("plan");
    const answered = Boolean(plan.ref);
    if (answered && plan.seq >= seq) flying = 0;
    if (plan.ref === wanted) wanted = "";
    say(hint, wanted ? `Looking at ${wanted}…` : "Choose a model above to see what memory it takes.");
    show(hint, !answered || Boolean(wanted));
    show(body, answered && !wanted);
    if (answered) {
      // An answer to an older question must not move the sliders back.
      if (!wanted && (plan.ref !== ref || plan.seq >= seq)) {
        if (plan.ref !== ref) seq = plan.seq;
        ref = plan.ref;
        if (!waiting && plan.settings) settings = { ...plan.settings };
      }
      say(title, plan.name ?? plan.ref);
      say(problem, plan.error);
      show(problem, Boolean(plan.error));
      for (const part of [fields, legend, bars, sentence, source, verdict, actions]) show(part, !plan.error);
      go.disabled = Boolean(plan.error);
      if (!plan.error) {
        drawFields();
        drawBars(plan.bars, plan.segments);
        verdict.update(plan.verdict.word, plan.verdict.kind);
        say(sentence, plan.verdict.text);
        say(source, plan.settling ? `${plan.source}; the exact number follows` : plan.source);
        set(node, "data-settling", plan.settling);
        set(go, "class", plan.verdict.kind === "error" ? "" : "nbinfer-w-primary");
        say(go, plan.verdict.kind === "error" ? "Load although it does not fit" : "Load");
      }
      show(fits, !plan.error && plan.advice.length > 0);
      keyed(advice, plan.error ? [] : plan.advice, (row) => row.label, (first) => {
        // Labels are rounded: the button stays where the numbers behind it change.
        let now = first;
        const press = button(first.label, () => { settings = { ...settings, ...now.settings }; drawFields(); ask(); });
        press.update = (row) => { now = row; say(press, row.label); };
        return press;
      });
    }
    const loading = model.get("loading");
    const busy = Boolean(loading.text);
    show(progress, busy);
    show(progressText, busy);
    if (busy) { progress.value = loading.fraction; say(progressText, loading.text); go.disabled = true; }
    if (waiting && !flying) ask();
  };
  return { node, draw, choose, on: ["plan", "loading"] };
}

function requestsView(model, link) {
  const list = el("ul", { class: "nbinfer-w-list" });
  const none = el("div", { class: "nbinfer-w-note" }, "No request is running.");
  const node = section("Running", list, none);
  const make = (first) => {
    const what = el("span"), who = el("span", { class: "nbinfer-w-facts" });
    const why = el("span", { class: "nbinfer-w-facts", id: uid("why") });
    // The kernel may say this and that before it says that the request is stopping.
    let pressed = false;
    const press = button("Stop", () => {
      press.disabled = pressed = true;
      link.send({ do: "stop", id: first.id });
    }, { "aria-describedby": why.id });
    const row = el("li", {}, el("div", { class: "nbinfer-w-main" }, what, el("div", {}, who)), why, press);
    row.update = (r) => {
      say(what, r.what);
      say(who, r.model);
      set(press, "aria-label", `Stop: ${r.what}`);
      const held = link.blocked && !r.stopping;
      press.disabled = pressed || r.stopping || held;
      say(press, r.stopping ? "Stopping…" : "Stop");
      say(why, held ? "a cell holds the kernel: use ■" : "");
    };
    return row;
  };
  const draw = () => {
    const { rows } = model.get("requests");
    keyed(list, rows, (row) => row.id, make);
    show(list, rows.length > 0);
    show(none, rows.length === 0);
  };
  return { node, draw, on: ["requests", "kernel"] };
}

function backendsView(model) {
  const list = el("ul", { class: "nbinfer-w-list" });
  const node = section("Backends", list);
  const make = () => {
    const name = el("strong"), word = badge(), detail = el("span"), line = el("code"), copied = el("span", { role: "status" });
    const note = el("div", { class: "nbinfer-w-note" });
    const copy = button("Copy", async () => {
      try {
        await navigator.clipboard.writeText(line.textContent);
        say(copied, "copied");
      } catch { // no permission: then it is selected, for Ctrl+C
        getSelection().selectAllChildren(line);
        say(copied, "selected");
      }
    });
    const summary = el("summary", {}, "How to install");
    const more = el("details", {}, summary, line, " ", copy, " ", copied, note);
    const row = el("li", {}, el("div", { class: "nbinfer-w-main" }, name, " ", word, " ", detail, more));
    row.update = (b) => {
      say(name, b.name);
      word.update(b.word, b.kind);
      say(detail, b.detail);
      say(line, b.install);
      say(note, b.more);
      say(summary, b.kind === "ok" ? "How to make it faster" : "How to install");
      set(copy, "aria-label", `Copy the line for ${b.name}`);
      show(more, Boolean(b.install));
    };
    return row;
  };
  const draw = () => keyed(list, model.get("backends").rows, (row) => row.name, make);
  return { node, draw, on: ["backends"] };
}

function messagesView(model, link) {
  const list = el("ul", { class: "nbinfer-w-list", "aria-live": "polite" });
  const node = el("div", {}, list);
  const make = (first) => {
    const text = el("div", { class: "nbinfer-w-said" }), log = el("pre", { tabindex: 0 });
    const more = el("details", {}, el("summary", {}, "The end of its log"), log);
    const close = button("×", () => link.send({ do: "dismiss", id: first.id }), { "aria-label": "Dismiss this message" });
    const row = el("li", {}, el("div", { class: "nbinfer-w-main" }, text, more), close);
    row.update = (m) => {
      set(row, "data-kind", m.kind);
      say(text, m.text);
      say(log, m.log);
      show(more, Boolean(m.log));
    };
    return row;
  };
  const draw = () => {
    const { rows } = model.get("messages");
    keyed(list, rows, (row) => row.id, make);
    show(list, rows.length > 0);
  };
  return { node, draw, on: ["messages"] };
}

function badgeView(model) {
  const word = badge(), name = el("strong"), detail = el("span");
  const node = el("div", { role: "status" }, name, " ", word, " ", detail);
  const draw = () => {
    const { name: who, word: what, kind, detail: more } = model.get("badge");
    say(name, who);
    word.update(what, kind);
    say(detail, more);
  };
  return { node, draw, on: ["badge"] };
}

// -- the widgets ----------------------------------------------------------------------------------------

function render({ model, el: host }) {
  const root = el("div", { class: "nbinfer-w", onkeydown: (event) => event.stopPropagation() });
  const kind = model.get("kind");
  set(root, "data-kind", kind);
  const link = connection(model, root);
  const status = el("div", { class: "nbinfer-w-status", role: "status" });
  const parts = [];
  if (kind === "badge") parts.push(badgeView(model));
  else if (kind === "monitor") parts.push(machineView(model));
  else if (kind === "bar") parts.push(planView(model, link, { load: false }));
  else {
    const plan = planView(model, link, { load: true });
    const choose = (row) => { plan.choose(row); plan.node.scrollIntoView({ block: "nearest" }); };
    parts.push(messagesView(model, link), machineView(model), loadedView(model, link), requestsView(model, link),
      modelsView(model, link, choose), plan, backendsView(model));
    set(root, "role", "region");
    set(root, "aria-label", "nbinfer panel");
  }
  root.append(status, ...parts.map((part) => part.node));
  const subscriptions = [];
  for (const part of parts) {
    for (const name of part.on) {
      const event = `change:${name}`;
      model.on(event, part.draw);
      subscriptions.push([event, part.draw]);
    }
    part.draw();
  }
  link.listen(() => {
    say(status, link.text);
    show(status, Boolean(link.text));
    parts.filter((part) => part.on.includes("requests")).forEach((part) => part.draw());
  });
  show(status, false);
  host.append(root);
  return () => {
    link.close();
    for (const [event, draw] of subscriptions) model.off(event, draw);
  };
}

export default { render };
