// Plotly figures: drawn in the page's colours when they come into view, and redrawn after changes.
import { call } from "./common.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map(); // of each figure: its address and the answer, as text
const listeners = new Map();
const TOP = 12, TOOLS = 26; // pixels above a plot, and of the buttons there, which so cover nothing

function tone(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

// The colours of figures on light and dark backgrounds (evomerge/report/svg.py).
const DARKER = {
  "#0969da": "#58a6ff", "#bc4c00": "#f0883e", "#1a7f37": "#3fb950", "#8250df": "#bc8cff", "#bf3989": "#f778ba",
  "#0f766e": "#2dd4bf",
};
const recoloured = (text) => (dark.matches ? text.replace(/#[0-9a-f]{6}/gi, (tone) => DARKER[tone.toLowerCase()] ?? tone) : text);

/** Move the notes in a figure's title to a paragraph above it, which wraps and is read by screen readers. */
function tell(box, layout) {
  const text = new DOMParser().parseFromString((layout.title?.text ?? "").replace(/<br\s*\/?>/g, " "), "text/html").body.textContent;
  let paragraph = box.previousElementSibling;
  if (!paragraph?.classList.contains("told")) {
    paragraph = document.createElement("p");
    paragraph.className = "told quiet small";
    box.before(paragraph);
  }
  paragraph.textContent = text;
  paragraph.hidden = text === "";
}

/** Add the page's colours; the figure's own settings take precedence. */
function themed(layout, box) {
  const ink = tone("--ink"), quiet = tone("--quiet"), line = tone("--line");
  const axis = (own) => ({
    gridcolor: line, zerolinecolor: line, linecolor: line, tickcolor: line, automargin: true, ...own,
    tickfont: { color: quiet, ...(own || {}).tickfont },
    title: typeof (own || {}).title === "string" ? { text: own.title } : (own || {}).title,
  });
  const styled = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    margin: { l: 48, r: 12, t: 12, b: 44 }, hovermode: "closest", ...layout,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, ...(layout.font || {}), color: ink },
    legend: { orientation: "h", y: -0.22, x: 0, font: { color: ink }, ...(layout.legend || {}) },
    hoverlabel: { bgcolor: tone("--surface"), bordercolor: tone("--edge"), font: { color: ink }, ...(layout.hoverlabel || {}) },
  };
  styled.modebar = { bgcolor: "rgba(0,0,0,0)", color: quiet, activecolor: tone("--accent"), orientation: "h" };
  if (layout.annotations) styled.annotations = layout.annotations.map((annotation) => ({ ...annotation, bgcolor: tone("--surface"), font: { ...annotation.font, color: quiet } }));
  for (const name of new Set(["xaxis", "yaxis", ...Object.keys(layout)])) {
    if (/^[xy]axis\d*$/.test(name)) styled[name] = axis(layout[name]);
  }
  if (layout.coloraxis) {
    styled.coloraxis = { ...layout.coloraxis, colorbar: { ...layout.coloraxis.colorbar, tickfont: { color: ink } } };
  }
  delete styled.template;
  delete styled.title;
  styled.margin = { ...styled.margin, t: TOP + TOOLS };
  delete styled.width;
  const height = layout.height && layout.height - ((layout.margin?.t ?? TOP) - TOP); // without the room for its title
  if (height) box.style.minHeight = `${height + TOOLS}px`;
  styled.height = height ? height + TOOLS : box.clientHeight || undefined;
  box.style.minWidth = layout.meta?.least_width ? `${layout.meta.least_width}px` : "";
  return styled;
}

function waiting(box, text) {
  if (globalThis.Plotly && box.classList.contains("js-plotly-plot")) globalThis.Plotly.purge(box);
  box.classList.add("lesser");
  const note = document.createElement("div");
  note.className = "waiting";
  note.textContent = text;
  box.replaceChildren(note);
}

async function paint(box, force) {
  const address = box.dataset.figure;
  let figure;
  try {
    figure = await call(address);
  } catch (error) {
    drawn.delete(box);
    waiting(box, error.status === 404 || error.status === 422 || error.status === 409 ? error.message : `This figure cannot be drawn: ${error.message}`);
    return;
  }
  if (box.dataset.figure !== address) return; // another one was asked for meanwhile
  const text = recoloured(JSON.stringify(figure));
  if (!force && drawn.get(box) === text) return;
  drawn.set(box, text);
  figure = JSON.parse(text);
  const empty = !(figure.data || []).length;
  tell(box, figure.layout ?? {});
  if (empty) { waiting(box, box.previousElementSibling.textContent || "Nothing to draw yet."); box.previousElementSibling.hidden = true; return; }
  box.classList.remove("lesser");
  box.querySelector(":scope > .waiting")?.remove();
  await globalThis.Plotly.react(box, figure.data, themed(figure.layout || {}, box), {
    responsive: true, displaylogo: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]], doubleClickDelay: 400,
  });
  if (ringed.has(box)) ring(box, ringed.get(box));
  const listen = listeners.get(box);
  if (listen && !box.dataset.listens) {
    box.dataset.listens = "yes";
    box.on("plotly_click", (event) => listen(event.points[0]));
  }
}

const RING = 9; // pixels from its middle
const ringed = new Map(); // of each figure: the candidate whose point has a ring

/** Draw a ring around the point of a candidate, if there is one; it is kept when the figure is redrawn. */
export function ring(box, number) {
  ringed.set(box, number);
  if (!box.classList.contains("js-plotly-plot") || !box._fullData) return;
  const at = box._fullData.map((trace) => [trace, [...(trace.customdata ?? [])].findIndex((value) => Number(value) === number)]);
  const [trace, i] = at.find(([, i]) => i >= 0) ?? [];
  const shapes = trace === undefined ? [] : [{
    type: "circle", xsizemode: "pixel", ysizemode: "pixel", xanchor: trace.x[i], yanchor: trace.y[i], x0: -RING, x1: RING, y0: -RING,
    y1: RING, line: { color: tone("--ink"), width: 2.5 }, name: "selected",
  }];
  globalThis.Plotly.relayout(box, { shapes });
}

const inView = new Set();
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) { inView.add(target); if (!drawn.has(target) && target.dataset.figure) paint(target, false); } else inView.delete(target);
  }
}, { rootMargin: "200px" });

/** Draw every figure of the page as it comes into view. */
export function start() {
  for (const box of document.querySelectorAll(".figure")) watcher.observe(box);
  dark.addEventListener("change", () => { for (const box of drawn.keys()) paint(box, true); });
}

/** Change what a figure shows. */
export function show(box, address) {
  if (box.dataset.figure === address && drawn.has(box)) return;
  box.dataset.figure = address;
  drawn.delete(box);
  if (inView.has(box)) paint(box, false);
}

/** Register a callback for clicks on points. */
export function onPoint(box, listen) { listeners.set(box, listen); }

/** Redraw the figures in view; the others are redrawn when they come into view. */
export async function update() {
  for (const box of [...drawn.keys()]) if (!inView.has(box)) drawn.delete(box);
  for (const box of inView) if (box.dataset.figure) await paint(box, false);
}
