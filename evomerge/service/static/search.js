// One search, live: parts of the page and figures follow the stream of events; buttons send commands.
import { call, element, follow, refresh, speak, throttled, toast } from "./common.js";
import * as figures from "./figures.js";

const PAGE_MS = 1500, FIGURES_MS = 6000; // how often at most they are fetched again
const head = document.getElementById("search");
const { api, name, here, seq } = head.dataset;
const byId = (id) => document.getElementById(id);

// ---- updates ----

const update = throttled(async () => {
  const before = document.querySelector("#title .badge")?.textContent;
  await refresh();
  const state = document.querySelector("#title .badge")?.textContent;
  const line = `${name}: ${byId("finished")?.textContent} candidates`;
  offer();
  if (before !== state) speak(`${name} is ${state}`, true); else speak(line);
}, PAGE_MS);
const redraw = throttled(figures.update, FIGURES_MS);
let away = false;

function hear(event) {
  if (document.hidden) { away = true; return; } // drawn when somebody looks again
  update();
  if (event.kind !== "dispatch" && event.kind !== "open") redraw();
}
follow(`${api}/events?since=${seq}`, hear);
document.addEventListener("visibilitychange", () => { if (!document.hidden && away) { away = false; update(); redraw(); } });

// ---- figures ----

const chosen = byId("selected-figure"), picker = byId("select-candidate");

function select(number) {
  const id = `c${String(number).padStart(4, "0")}`;
  byId("selected-name").textContent = id;
  byId("selected-link").href = `${here}/candidates/${number}`;
  byId("selected-compare").href = `${here}/compare?a=${id}`;
  byId("selected-export").href = `${here}/exports?candidate=${id}`;
  if (![...picker.options].some((option) => option.value === String(number))) {
    const option = element("option", "", id);
    option.value = String(number);
    picker.append(option);
  }
  picker.value = String(number);
  figures.ring(byId("front-figure"), number);
  figures.show(chosen, `${api}/candidates/${number}/figures/recipe`);
}

/** Offer the current best candidates; the best of them is shown until the user selects one. */
let isChosen = false;
function offer() {
  const options = [...byId("choices").children].map((choice) => new Option(choice.textContent, choice.dataset.number));
  const before = picker.value, [best] = options;
  if (before && !options.some((option) => option.value === before)) options.push(new Option(`c${before.padStart(4, "0")}`, before));
  picker.replaceChildren(...options);
  picker.value = before;
  if (!isChosen && best && best.value !== before) select(Number(best.value));
}
picker.addEventListener("change", () => { isChosen = true; select(Number(picker.value)); });
function choose(point) {
  const candidate = [point.customdata].flat().find((value) => Number.isInteger(Number(value)) || /^c\d+$/.test(value));
  if (candidate === undefined) return;
  isChosen = true;
  select(Number(String(candidate).replace(/^c/, "")));
  speak(`Recipe of ${byId("selected-name").textContent}`, true);
}
for (const box of [byId("front-figure"), document.getElementById("grid-figure")]) if (box) figures.onPoint(box, choose);
if (picker.value) select(Number(picker.value));

for (const button of document.querySelectorAll("[data-over]")) {
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll("[data-over]")) other.setAttribute("aria-pressed", String(other === button));
    figures.show(byId("history-figure"), `${api}/figures/history?over=${button.dataset.over}`);
  });
}

const parameter = byId("parameter"), objective = byId("about-objective");
function genes() {
  const about = new URLSearchParams();
  if (objective) about.set("objective", objective.value);
  for (const box of document.querySelectorAll("#genes .figure")) {
    const kind = box.dataset.figure.split("?")[0];
    const query = new URLSearchParams(about);
    if (box.id === "slice-figure" && parameter.value) query.set("parameter", parameter.value);
    figures.show(box, query.size ? `${kind}?${query}` : kind);
  }
}
parameter.addEventListener("change", genes);
objective?.addEventListener("change", genes);
genes();
figures.start();

// ---- the table of candidates: links and filters reload only the table ----

async function table(address) {
  history.replaceState(null, "", address);
  await refresh(address);
}
byId("filters").addEventListener("submit", (event) => {
  event.preventDefault();
  const wanted = new URLSearchParams([...new FormData(event.target)].filter(([, value]) => value !== ""));
  table(`${here}?${wanted}`).catch((error) => toast(error.message, "bad"));
});
byId("filters").addEventListener("change", () => byId("filters").requestSubmit());
byId("candidates").addEventListener("click", (event) => {
  const link = event.target.closest("a[data-table]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  table(link.href).catch((error) => toast(error.message, "bad"));
});

// ---- commands ----

const DONE = { pause: "It pauses: what runs finishes, nothing new begins.", resume: "It goes on.",
  confirm: "The best are scored on the held-out split.", stop: "It stops when what runs has finished.", cancel: "It is cancelled." };
const SURE = { stop: "Stop this search? Candidates that are running are finished first. Nothing is scored on the held-out split. You can resume it later.",
  cancel: "Cancel this search at once? Candidates that are running are thrown away. You can resume it later." };

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-verb]");
  if (!button) return;
  const verb = button.dataset.verb;
  if (SURE[verb] && !confirm(SURE[verb])) return;
  button.setAttribute("aria-disabled", "true");
  try {
    await call(`${api}/${verb}`, "POST");
    toast(DONE[verb]);
    setTimeout(update, 500);
  } catch (error) {
    toast(error.message, "bad");
  } finally {
    button.removeAttribute("aria-disabled");
  }
});

const budget = byId("budget"), refused = byId("budget-fault");
document.addEventListener("click", (event) => {
  if (event.target.closest("#raise")) { refused.replaceChildren(); budget.showModal(); }
});
budget.addEventListener("submit", async (event) => {
  if (event.submitter?.value !== "raise") return;
  event.preventDefault(); // the dialog stays until the budget is taken, so that what is refused can be mended in it
  const form = new FormData(event.target);
  const number = (key) => (form.get(key) === "" ? null : Number(form.get(key)));
  refused.replaceChildren();
  try {
    await call(`${api}/budget`, "POST", {
      candidates: number("candidates"), hours: number("hours"), patience: number("patience"), resume: form.has("resume"),
      ...(form.has("cost") ? { cost: number("cost") } : {}),
    });
    budget.close();
    toast("The budget is changed.");
    setTimeout(update, 500);
  } catch (error) {
    refused.append(element("p", "note bad", error.message));
  }
});
