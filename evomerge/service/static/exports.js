// Exports: start one, follow its progress, see its card.
import { call, element, refresh, speak, toast } from "./common.js";

const EVERY_MS = 1000;
const form = document.getElementById("export");
const { api, place, search } = form.dataset;
const quoted = (text) => (/^[\w./@:+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** The folder's name follows the candidate until the user edits it. */
let isOwn = false;
function propose() {
  const taken = new Set([...document.querySelectorAll("[data-export]")].map((card) => card.dataset.export));
  const wanted = `${search.slice(0, 40)}-${form.elements.candidate.value.trim()}`.replace(/[^A-Za-z0-9_-]+/g, "-").slice(0, 60);
  let name = wanted;
  for (let i = 2; taken.has(name); i += 1) name = `${wanted}-${i}`;
  form.elements.name.value = name;
}

form.addEventListener("input", (event) => {
  if (event.target === form.elements.name) isOwn = true;
  if (event.target === form.elements.candidate && !isOwn) propose();
  document.getElementById("unverified-hint").hidden = !form.elements.unverified.checked;
  const unverified = form.elements.unverified.checked ? " --no-verify" : "";
  const command = `evomerge export ${place} ${place}/exports/${quoted(form.elements.name.value)} --candidate ${quoted(form.elements.candidate.value)}${unverified}`;
  form.querySelector(".command .code").textContent = command;
  form.querySelector("[data-copy]").dataset.copy = command;
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const fault = document.getElementById("export-fault");
  fault.replaceChildren();
  try {
    await call(api, "POST", {
      candidate: form.elements.candidate.value, name: form.elements.name.value, verify: !form.elements.unverified.checked,
    });
    toast("The export has begun.");
    await refresh();
  } catch (error) {
    fault.append(element("div", "note bad", error.message));
  }
});

form.querySelector("[type=submit]").disabled = false; // before, the browser would load the page anew and lose what was written

const running = () => [...document.querySelectorAll("[data-export]")].filter((card) => card.dataset.state === "running");
async function turn() {
  const before = running().length;
  if (before && !document.hidden) {
    try {
      await refresh();
      if (running().length < before) speak("An export has ended.", true);
    } catch { /* the next poll tries again */ }
  }
  setTimeout(turn, EVERY_MS);
}
turn();
