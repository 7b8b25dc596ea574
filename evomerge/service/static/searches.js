// The list of searches: fetched again every few seconds while the page is visible.
import { refresh, speak } from "./common.js";

const EVERY_MS = 3000;
const shown = document.getElementById("connection");

async function turn() {
  if (!document.hidden) {
    try {
      await refresh();
      if (shown.dataset.state !== "live") { shown.dataset.state = "live"; shown.textContent = "live"; }
      const lines = [...document.querySelectorAll(".search")].map((card) =>
        `${card.querySelector("h2").textContent}: ${card.querySelector(".badge").textContent}, ${card.querySelector(".big").textContent} candidates`);
      speak(lines.join("; "));
    } catch {
      shown.dataset.state = "away";
      shown.textContent = "not connected, trying again";
    }
  }
  setTimeout(turn, EVERY_MS);
}
setTimeout(turn, EVERY_MS);
shown.dataset.state = "live";
shown.textContent = "live";
