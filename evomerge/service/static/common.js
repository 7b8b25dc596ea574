// Shared by all pages: API calls, messages, copying, and keeping parts of a page up to date.

/** Call the API. Failures throw an Error whose `problem` is the response's problem+json. `signal` aborts the call. */
export async function call(address, method = "GET", body = undefined, signal = undefined) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(address, {
    method, headers, signal, credentials: "same-origin", body: body === undefined ? undefined : JSON.stringify(body),
  });
  const text = await answer.text();
  let content = null;
  try { content = text ? JSON.parse(text) : null; } catch { content = null; }
  if (answer.status === 401) { location.assign(`/login?next=${encodeURIComponent(location.pathname + location.search)}`); }
  if (!answer.ok) {
    const error = new Error(words(content) || `the server answered ${answer.status}`);
    error.problem = content || { title: error.message, faults: [] };
    error.status = answer.status;
    throw error;
  }
  return content;
}

/** A problem in one or a few sentences. */
export function words(problem) {
  if (!problem) return "";
  const faults = (problem.faults || []).map((f) => `${f.field ? `${f.field}: ` : ""}${f.problem}${f.hint ? `. ${f.hint}` : ""}`);
  return faults.length ? faults.join("\n") : problem.detail || problem.title || "";
}

/** Show a temporary message, which screen readers announce. */
export function toast(text, kind = "good") {
  const place = document.getElementById("toast");
  const note = element("div", `note ${kind}`, text);
  place.replaceChildren(note);
  setTimeout(() => note.remove(), kind === "bad" ? 12000 : 5000);
}

let spokenAt = 0;
/** Announce a text to screen readers only, at a limited rate. */
export function speak(text, now = false) {
  const place = document.getElementById("spoken");
  if (place.textContent === text || (!now && Date.now() - spokenAt < 15000)) return;
  spokenAt = Date.now();
  place.textContent = text;
}

export function element(tag, kind = "", text = "") {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text) made.textContent = text;
  return made;
}

/** Throttle `act` to one run per `pause` milliseconds; the last call is never lost. */
export function throttled(act, pause) {
  let timer = null, last = 0, busy = false, again = false;
  async function run() {
    timer = null;
    if (busy) { again = true; return; }
    busy = true;
    last = Date.now();
    try { await act(); } finally {
      busy = false;
      if (again) { again = false; ask(); }
    }
  }
  function ask() {
    if (timer === null) timer = setTimeout(run, Math.max(0, last + pause - Date.now()));
  }
  return ask;
}

const seen = new Map();
let asked = 0, shown = 0; // answers may overtake each other; the page never goes back to what was asked for earlier

/** Fetch this page again and replace those parts marked `data-live` that have changed. */
export async function refresh(address = location.href) {
  const mine = ++asked;
  const answer = await fetch(address, { headers: { Accept: "text/html" }, credentials: "same-origin" });
  if (answer.redirected && new URL(answer.url).pathname === "/login") { location.assign(answer.url); return; }
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  if (mine < shown) return;
  shown = mine;
  for (const part of document.querySelectorAll("[data-live]")) {
    const fresh = page.getElementById(part.id);
    if (fresh === null) continue;
    const html = fresh.outerHTML;
    if (seen.get(part.id) === html) continue;
    if (!seen.has(part.id) && part.outerHTML === html) { seen.set(part.id, html); continue; }
    seen.set(part.id, html);
    replace(part, document.adoptNode(fresh));
  }
}

/** Replace a part, but keep open details, the focus, and the scroll positions of tables. */
function replace(old, fresh) {
  const keys = new Set([...old.querySelectorAll("[data-key]")].map((row) => row.dataset.key));
  for (const details of old.querySelectorAll("details[id]")) {
    const same = fresh.querySelector(`#${CSS.escape(details.id)}`);
    if (same) same.open = details.open;
  }
  const focus = old.contains(document.activeElement) ? handle(document.activeElement) : null;
  const scrolled = [...old.querySelectorAll(".scroll")].map((pane) => pane.scrollLeft);
  old.replaceWith(fresh);
  [...fresh.querySelectorAll(".scroll")].forEach((pane, i) => { pane.scrollLeft = scrolled[i] || 0; });
  if (focus) fresh.querySelector(focus)?.focus({ preventScroll: true });
  if (keys.size) {
    for (const row of fresh.querySelectorAll("[data-key]")) if (!keys.has(row.dataset.key)) row.classList.add("fresh");
  }
}

/** A selector that finds an element again after its part was replaced. */
function handle(active) {
  if (active.id) return `#${CSS.escape(active.id)}`;
  for (const name of ["data-verb", "href", "aria-label"]) {
    if (active.hasAttribute(name)) return `[${name}="${CSS.escape(active.getAttribute(name))}"]`;
  }
  return null;
}

/** Follow a stream of events, and show in the header whether it is connected; `hear` is called with each event. */
export function follow(address, hear) {
  const shown = document.getElementById("connection");
  const show = (state, text) => { if (shown && shown.dataset.state !== state) { shown.dataset.state = state; shown.textContent = text; } };
  const stream = new EventSource(address);
  stream.onopen = () => { show("live", "live"); hear({ kind: "open" }); };
  stream.onerror = () => show("away", "not connected, trying again");
  stream.onmessage = (message) => hear(JSON.parse(message.data));
  addEventListener("pagehide", () => stream.close());
  return stream;
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy], [data-copy-from]");
  if (!button) return;
  const text = button.dataset.copy ?? document.getElementById(button.dataset.copyFrom).textContent;
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied.");
  } catch {
    toast("The browser does not let this page copy: mark the text and copy it by hand.", "bad");
  }
});

// A page restored from the back/forward cache is outdated; reload it.
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
