// How close models are, as tables: facts, distances from the base, a heat map of cosines by part of the model, warnings.
import { element } from "./common.js";

const percent = (value) => (value === null || value === undefined ? "·" : `${(100 * value).toPrecision(3)}%`);
const count = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} B` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} M` : `${(n / 1e3).toFixed(1)} k`);

function table(caption, titles, rows, kind = "") {
  const scroll = element("div", "scroll"), made = element("table", kind), head = element("tr"), body = element("tbody");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", caption);
  made.append(element("caption", "", caption));
  for (const title of titles) { const cell = element("th", "", title); cell.scope = "col"; head.append(cell); }
  const thead = element("thead");
  thead.append(head);
  for (const [first, ...others] of rows) {
    const row = element("tr"), title = element("th", "", first);
    title.scope = "row";
    row.append(title, ...others);
    body.append(row);
  }
  made.append(thead, body);
  scroll.append(made);
  return scroll;
}

const cell = (text, kind = "") => element("td", kind, text);

/** A cell whose background shows its value: blue for agreement, red for conflict. */
function heat(value, text, strength) {
  const made = cell(text);
  if (value === null || value === undefined) { made.className = "none"; return made; }
  const share = Math.round(60 * Math.min(1, strength));
  made.style.background = `color-mix(in srgb, var(${value < 0 ? "--bad" : "--accent"}) ${share}%, var(--surface))`;
  if (share > 45) made.style.color = "var(--ink)";
  return made;
}

export function drawInspection(place, inspection) {
  const parts = [];
  if (inspection.warnings?.length) {
    const note = element("div", "note warn"), list = element("ul");
    note.append(element("strong", "", "Beware"));
    for (const text of inspection.warnings) list.append(element("li", "", text));
    note.append(list);
    parts.push(note);
  } else parts.push(element("div", "note good", "Nothing speaks against merging these."));
  parts.push(table("The models", ["model", "architecture", "layers", "parameters", "type", "tokens"], inspection.models.map((m) => [
    m.name === inspection.base ? `${m.name} (base)` : m.name, cell(m.architecture.replace(/ForCausalLM$/, "")), cell(String(m.layers), "num"),
    cell(count(m.parameters), "num"), cell(m.dtype), cell(m.tokens === null ? "none" : m.tokens.toLocaleString("en"), "num"),
  ])));
  const origin = inspection.base ?? "the base";
  if (inspection.sources?.length) {
    parts.push(table(`How far each source is from ${origin}`, ["source", "|d| / |b|", "mean |d|", "changed"], inspection.sources.map((s) => [
      s.name, cell(percent(s.whole.relative_norm), "num"), cell(s.whole.mean_change.toPrecision(2), "num"), cell(percent(s.whole.changed), "num"),
    ])));
  }
  if (inspection.parts?.length && inspection.sources?.length) {
    const most = Math.max(...inspection.sources.flatMap((s) => s.parts.map((d) => d.relative_norm ?? 0)), 1e-12);
    const titles = ["part", ...inspection.sources.map((s) => `|d| ${s.name}`), ...inspection.pairs.map((p) => `cos ${p.a} · ${p.b}`)];
    const rows = [["all", ...inspection.sources.map((s) => heat(s.whole.relative_norm, percent(s.whole.relative_norm), (s.whole.relative_norm ?? 0) / most)),
      ...inspection.pairs.map((p) => heat(p.whole.cosine, p.whole.cosine?.toFixed(2) ?? "·", Math.sqrt(Math.abs(p.whole.cosine ?? 0))))]];
    inspection.parts.forEach((part, i) => rows.push([part,
      ...inspection.sources.map((s) => heat(s.parts[i].relative_norm, percent(s.parts[i].relative_norm), (s.parts[i].relative_norm ?? 0) / most)),
      ...inspection.pairs.map((p) => heat(p.parts[i].cosine, p.parts[i].cosine?.toFixed(2) ?? "·", Math.sqrt(Math.abs(p.parts[i].cosine ?? 0)))),
    ]));
    const details = element("details");
    details.open = true;
    details.append(element("summary", "", "Heat map, part by part"), table("Size of changes, and cosines between them, by part of the model", titles, rows, "heat"));
    parts.push(details);
  }
  place.replaceChildren(...parts);
}
