// A new search: a form that writes the search file, the file itself, the server's check of it, and starting it.
import { call, element, speak, toast, words } from "./common.js";
import { drawInspection } from "./inspection.js";
import { dump } from "./yaml.js";

const byId = (id) => document.getElementById(id);
const about = JSON.parse(byId("about").textContent);
const form = byId("form"), file = byId("file"), gutter = byId("gutter"), verdict = byId("verdict");
const sources = new Map(); // reference -> short name
let byHand = false, numbers = 0;

// ---- sources ----

function shortName(reference) {
  const wanted = reference.split("+").pop().split("@")[0].split("/").pop().replace(/[^A-Za-z0-9_-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "") || "model";
  const taken = new Set(sources.values());
  for (let i = 1; ; i += 1) { const name = i === 1 ? wanted : `${wanted}-${i}`; if (!taken.has(name)) return name; }
}

function addSource(reference) {
  if (!reference || sources.has(reference)) return;
  sources.set(reference, shortName(reference));
  sourcesChanged();
}

function removeSource(reference) { sources.delete(reference); sourcesChanged(); }

async function listFolders() {
  const place = byId("folders"), note = byId("folders-note");
  try {
    const listed = await call("/api/v1/sources");
    const folders = listed.sources;
    note.hidden = folders.length > 0;
    note.textContent = "No model folder is known here. Start the server with --sources FOLDER, or name models of the hub.";
    for (const folder of folders) {
      const { reference } = folder, label = element("label", "inline"), box = element("input");
      box.type = "checkbox";
      box.disabled = reference === null;
      if (reference !== null) box.dataset.folder = reference;
      box.addEventListener("change", () => (box.checked ? addSource(reference) : removeSource(reference)));
      const text = element("span"), of = folder.adapter_of;
      text.append(element("span", "", folder.name), " ");
      if (of !== null) text.append(element("span", "badge plain", "adapter"), " ");
      text.append(element("span", "hint", reference ?? `its base model ${of} is in no folder here: add it below as BASE+ADAPTER`));
      label.append(box, text);
      place.append(label);
    }
  } catch (error) {
    note.textContent = `Model folders cannot be listed: ${error.message}`;
  }
}

function sourcesChanged() {
  const place = byId("sources");
  place.replaceChildren();
  for (const [reference, name] of sources) {
    const row = element("div", "row"), input = element("input"), label = element("label", "hidden-text", `Short name of ${reference}`);
    input.id = `source-${name}`;
    label.htmlFor = input.id;
    input.value = name;
    input.style.width = "12rem";
    input.spellcheck = false;
    input.addEventListener("change", () => {
      const taken = [...sources].some(([other, its]) => other !== reference && its === input.value);
      if (taken || !/^[A-Za-z0-9][A-Za-z0-9_-]*$/.test(input.value)) { toast("A short name is of letters, digits, - and _, and of one source.", "bad"); input.value = name; return; }
      sources.set(reference, input.value);
      sourcesChanged();
    });
    const remove = element("button", "tiny", "Remove");
    remove.type = "button";
    remove.append(element("span", "hidden-text", ` ${name}`));
    remove.addEventListener("click", () => {
      const box = [...document.querySelectorAll("[data-folder]")].find((box) => box.dataset.folder === reference);
      if (box) box.checked = false;
      removeSource(reference);
    });
    row.append(label, input, element("span", "hint", reference), remove);
    place.append(row);
  }
  for (const [id, none] of [["base", "none"], ["tokenizer", "the base"]]) {
    const picker = byId(id), before = picker.value;
    picker.replaceChildren(new Option(none, ""), ...[...sources.values()].map((name) => new Option(name, name)));
    if ([...sources.values()].includes(before)) picker.value = before;
    else if (id === "base") picker.value = [...sources.values()].find((name) => /base/i.test(name)) ?? "";
  }
  build();
  inspect();
}

let inspecting = null;
/** Compare the selected models; an earlier request is aborted, here and on the server. */
async function inspect() {
  const place = byId("inspection");
  inspecting?.abort();
  const mine = inspecting = new AbortController();
  if (sources.size < 2) { place.replaceChildren(); return; }
  place.replaceChildren(element("p", "quiet", "Comparing the models; each weight is read once…"));
  try {
    const named = Object.fromEntries([...sources].map(([reference, name]) => [name, reference]));
    const inspection = await call("/api/v1/sources/inspect", "POST", { sources: named, base: byId("base").value || null }, mine.signal);
    drawInspection(place, inspection);
  } catch (error) {
    if (!mine.signal.aborted) place.replaceChildren(element("div", "note bad", error.message));
  }
}

// ---- fields ----

/** The values of the non-empty fields within an element, by their keys. */
function said(place) {
  const values = {};
  for (const input of place.querySelectorAll("[data-key]")) {
    const { key, kind } = input.dataset;
    if (kind === "switch") { if (input.checked) values[key] = true; continue; }
    // A leading space belongs to an answer, and \n in a prompt is a newline.
    const text = /(^|\.)(prompt|answer)$/.test(key) ? input.value.replaceAll("\\n", "\n") : input.value.trim();
    if (text === "") continue;
    if (kind === "numbers") values[key] = text.split(/[\s,]+/).filter(Boolean).map(number);
    else if (kind === "pairs") values[key] = text.includes("=") ? pairs(text) : text;
    else values[key] = kind === "number" || /^-?\d+(\.\d+)?$/.test(text) && kind !== "text" ? number(text) : text;
  }
  return values;
}
/** Write values with keys such as a.b as sections into `content`; a section replaces a plain value. */
function nested(values, content = {}) {
  for (const [path, value] of Object.entries(values)) {
    const [section, key] = path.split(".");
    if (!key) content[section] = value;
    else if (typeof content[section] === "object") content[section][key] = value;
    else content[section] = { [key]: value };
  }
  return content;
}
/** "a=one, b=two" as an object; a part without "=" is kept under its own name, so that the check reports it. */
function pairs(text) {
  return Object.fromEntries(text.split(",").map((pair) => pair.trim()).filter(Boolean).map((pair) => {
    const [name, ...rest] = pair.split("=");
    return [name.trim(), rest.join("=").trim()];
  }));
}
function number(text) { return Number.isFinite(Number(text)) ? Number(text) : text; }

function addObjective(evaluator) {
  numbers += 1;
  const made = byId("objective-template").content.cloneNode(true);
  const box = made.querySelector("[data-objective]");
  for (const node of [box, ...box.querySelectorAll("*")]) {
    for (const name of ["id", "for", "aria-describedby", "list"]) {
      if (node.hasAttribute(name)) node.setAttribute(name, node.getAttribute(name).replace(/^N-/, `o${numbers}-`));
    }
  }
  box.dataset.number = numbers;
  box.querySelector("legend").textContent = `Objective ${numbers}`;
  const remove = box.querySelector("[data-remove]");
  remove.querySelector("span").textContent = ` objective ${numbers}`;
  remove.addEventListener("click", () => { box.remove(); propose(); build(); byId("add-objective").focus(); });
  const picker = box.querySelector("[data-evaluator-of]");
  picker.value = evaluator;
  picker.addEventListener("change", () => { settings(box, picker.value); build(); });
  byId("objectives").append(made);
  settings(box, evaluator);
  propose();
  return box;
}

/** Select an optimizer that suits the number of objectives, until the user selects another. */
const optimizer = byId("optimizer-name"), forOne = optimizer.value;
let hasChosen = false;
function propose() {
  if (!hasChosen) optimizer.value = form.querySelectorAll("[data-objective]").length > 1 ? about.several : forOne;
}
optimizer.addEventListener("change", () => {
  hasChosen = true;
  for (const section of form.querySelectorAll("[data-optimizer]")) section.hidden = section.dataset.optimizer !== optimizer.value;
});

function settings(box, evaluator) {
  const place = box.querySelector("[data-settings]"), number = box.dataset.number;
  const made = document.querySelector(`template[data-evaluator="${CSS.escape(evaluator)}"]`).content.cloneNode(true);
  for (const node of made.querySelectorAll("*")) {
    for (const name of ["id", "for", "aria-describedby", "list"]) {
      if (node.hasAttribute(name)) node.setAttribute(name, node.getAttribute(name).replace(/^N-/, `o${number}-`));
    }
  }
  place.replaceChildren(made);
  box.querySelector("[data-about]").textContent = about.evaluators[evaluator] ?? "";
}

// ---- the file ----

function content() {
  const content = { name: byId("name").value.trim() };
  const seed = number(byId("seed").value.trim() || "0");
  if (seed !== 0) content.seed = seed;
  content.sources = Object.fromEntries([...sources].map(([reference, name]) => [name, reference]));
  for (const key of ["base", "tokenizer", "dtype"]) if (byId(key).value) content[key] = byId(key).value;
  const kind = form.querySelector("[name=space]:checked").value;
  content.space = { kind, ...nested(said(form.querySelector(`[data-space="${kind}"]`))) };
  content.objectives = {};
  for (const box of form.querySelectorAll("[data-objective]")) {
    const evaluator = box.querySelector("[data-evaluator-of]").value;
    const its = said(box.querySelector("[data-settings]"));
    const name = box.querySelector("[data-name]").value.trim() || String(its.task ?? evaluator).replace(/[^A-Za-z0-9_-]+/g, "_");
    const items = box.querySelector("[data-items]").value.trim(), direction = box.querySelector("[data-direction]").value;
    const unique = name in content.objectives ? `${name}_${box.dataset.number}` : name;
    box.dataset.called = unique;
    content.objectives[unique] = {
      ...(evaluator === "lm_eval" ? {} : { evaluator }), ...its,
      ...(items ? { items: number(items) } : {}), ...(direction ? { direction } : {}),
    };
  }
  content.budget = {}; // which is needed
  for (const place of form.querySelectorAll("[data-section]")) nested(said(place), content);
  const own = form.querySelector(`[data-optimizer="${CSS.escape(optimizer.value)}"]`);
  if (own) Object.assign(content.optimizer, said(own));
  return Object.fromEntries(about.keys.filter((key) => key in content).map((key) => [key, content[key]]));
}

function build() {
  if (byHand) return;
  file.value = dump(content());
  drawGutter();
}

function drawGutter(fault = 0) {
  const lines = file.value.split("\n").length;
  gutter.replaceChildren(...Array.from({ length: lines }, (_, i) => {
    const line = element("span", i + 1 === fault ? "fault" : "", String(i + 1));
    return line;
  }));
  gutter.style.height = `${file.clientHeight}px`;
  gutter.scrollTop = file.scrollTop;
}

// ---- the field of a fault ----

/** The form field that writes a key of the file, if there is one. */
function fieldOf(path) {
  const [first, second, third] = path;
  const within = (place, key) => place?.querySelector(`[data-key="${CSS.escape(key ?? "")}"]`) ?? null;
  if (first === "sources") return byId("reference");
  if (first === "space") {
    const place = form.querySelector("[data-space]:not([hidden])");
    return within(place, path.slice(1, 3).join(".")) ?? within(place, second);
  }
  if (first === "objectives") {
    const box = [...form.querySelectorAll("[data-objective]")].find((box) => box.dataset.called === second);
    if (["items", "direction"].includes(third)) return box?.querySelector(`[data-${third}]`) ?? null;
    return within(box, third ?? "task") ?? box?.querySelector("[data-name]") ?? byId("add-objective");
  }
  const section = within(form, path.slice(0, 2).join("."));
  if (section || second === undefined) return section ?? form.querySelector(`#${CSS.escape(first ?? "")}:is(input, select)`);
  return first === "optimizer" ? within(form.querySelector("[data-optimizer]:not([hidden])"), second) : null;
}

function clearField() {
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

function setByHand(value) {
  byHand = value;
  byId("hand").hidden = !value;
  byId("rebuild").hidden = !value;
}

file.addEventListener("input", () => { setByHand(true); file.removeAttribute("aria-invalid"); drawGutter(); });
file.addEventListener("scroll", () => { gutter.scrollTop = file.scrollTop; });
file.addEventListener("keydown", (event) => {
  // Tab leaves the field, as everywhere, for keyboard users.
  if (event.key === "Enter") {
    const before = file.value.slice(0, file.selectionStart).split("\n").pop().match(/^ */)[0];
    if (before) { event.preventDefault(); document.execCommand("insertText", false, `\n${before}`); }
  }
});
new ResizeObserver(() => { gutter.style.height = `${file.clientHeight}px`; }).observe(file);
byId("rebuild").addEventListener("click", () => { setByHand(false); verdict.replaceChildren(); build(); file.focus(); });
byId("copy").addEventListener("click", async () => {
  try { await navigator.clipboard.writeText(file.value); toast("Copied."); } catch { file.select(); toast("Marked: copy it with the keyboard.", "bad"); }
});

// ---- the server's check ----

function tellFaults(problem) {
  clearField();
  const box = element("div", "note bad"), line = problem.line ?? problem.faults?.find((fault) => fault.line)?.line ?? 0;
  box.append(element("strong", "", problem.title || "That does not work"));
  for (const fault of problem.faults?.length ? problem.faults : [{ field: "", problem: problem.detail ?? "" }]) {
    const paragraph = element("p");
    if (fault.field) paragraph.append(element("code", "", fault.field), " ");
    paragraph.append(fault.problem);
    if (fault.hint) paragraph.append(element("br"), fault.hint);
    box.append(paragraph);
  }
  if (line) {
    const go = element("button", "tiny", `Go to line ${line}`);
    go.type = "button";
    go.addEventListener("click", () => goTo(line));
    box.append(go);
  }
  const field = byHand ? null : fieldOf(problem.path ?? []);
  if (field) {
    field.setAttribute("aria-invalid", "true");
    const show = element("button", "tiny", "Go to the field");
    show.type = "button";
    show.addEventListener("click", () => { if (field.closest("details")) field.closest("details").open = true; field.focus(); });
    box.append(" ", show);
  }
  verdict.replaceChildren(box);
  file.setAttribute("aria-invalid", "true");
  drawGutter(line);
  if (line) scrollTo(line);
}

function scrollTo(line) {
  const height = parseFloat(getComputedStyle(file).lineHeight);
  file.scrollTop = Math.max(0, (line - 4) * height);
}

function goTo(line) {
  const lines = file.value.split("\n");
  const begin = lines.slice(0, line - 1).reduce((sum, text) => sum + text.length + 1, 0);
  file.focus();
  file.setSelectionRange(begin, begin + lines[line - 1].length);
  scrollTo(line);
}

function tellPlan(plan) {
  clearField();
  const box = element("div", "note good"), list = element("dl", "facts");
  box.append(element("strong", "", "It can be started. This is what it will do and cost:"));
  for (const row of plan.rows ?? []) {
    const text = element("dd", "", row.text);
    list.append(element("dt", "", row.key), text);
  }
  for (const text of plan.estimates ?? []) list.append(element("dt", "", "estimate"), element("dd", "", typeof text === "string" ? text : text.text));
  box.append(list);
  for (const asked of plan.prompts ?? []) {
    const shown = element("details", ""), text = element("pre", "", asked.prompt + asked.answer);
    text.tabIndex = 0;
    shown.append(element("summary", "", `A prompt of ${asked.place}`), text, element("p", "quiet", asked.tokens));
    box.append(shown);
  }
  verdict.replaceChildren(box);
  file.removeAttribute("aria-invalid");
  drawGutter();
}

/** The line of a fault in the file; the server finds it, because it parses YAML. */
async function locate(problem) {
  if (problem.line || !problem.faults?.length) return problem;
  try {
    const place = await call("/new/line", "POST", { file: file.value, field: problem.faults[0].field });
    return { ...problem, line: place.line, path: place.path };
  } catch { return problem; }
}

async function ask(button, busy, act) {
  button.disabled = true;
  verdict.replaceChildren(element("p", "quiet", busy));
  try {
    await act();
  } catch (error) {
    if (error.problem) tellFaults(await locate(error.problem)); else tellFaults({ title: error.message });
    speak(words(error.problem) || error.message, true);
  } finally {
    button.disabled = false;
  }
}

byId("check").addEventListener("click", () => ask(byId("check"), "Opening everything that the file names…", async () => {
  tellPlan(await call("/api/v1/searches/validate", "POST", { file: file.value }));
}));
byId("start").addEventListener("click", () => ask(byId("start"), "Checking, then starting…", async () => {
  const made = await call("/api/v1/searches", "POST", { file: file.value, start: byId("at-once").checked });
  location.assign(`/searches/${encodeURIComponent(made.name)}`);
}));

// ---- begin ----

for (const radio of form.querySelectorAll("[name=space]")) {
  radio.addEventListener("change", () => {
    for (const section of form.querySelectorAll("[data-space]")) section.hidden = section.dataset.space !== radio.value;
  });
}
byId("add-reference").addEventListener("click", () => { addSource(byId("reference").value.trim()); byId("reference").value = ""; });
byId("reference").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); byId("add-reference").click(); } });
byId("base").addEventListener("change", inspect);
byId("add-objective").addEventListener("click", () => { addObjective("lm_eval").querySelector("[data-name]").focus(); build(); });
form.addEventListener("input", (event) => { event.target.removeAttribute("aria-invalid"); build(); });
form.addEventListener("change", build);
form.addEventListener("submit", (event) => event.preventDefault());
addObjective("lm_eval");
build();
listFolders();
