"use strict";
// Everything is written as text nodes: nothing from the model is ever read as markup.
const cards = JSON.parse(document.getElementById("cards").textContent);
const panel = document.getElementById("details");

function add(parent, tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  parent.append(element);
  return element;
}

function show(group) {
  history.replaceState(null, "", `#${group.dataset.card}`);
  document.querySelectorAll(".card.chosen").forEach((one) => one.classList.remove("chosen"));
  group.classList.add("chosen");
  panel.replaceChildren();
  for (const node of cards[group.dataset.card]) {
    const section = add(panel, "section");
    add(section, "h3", node.title);
    add(section, "p", node.doc);
    for (const [name, lines] of node.facts) {
      add(section, "h4", name);
      for (const line of lines) add(section, "p", line, name === "why not" ? "why" : "mono");
    }
  }
}

for (const group of document.querySelectorAll(".card")) {
  group.addEventListener("click", () => show(group));
  group.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    show(group);
  });
}

const linked = [...document.querySelectorAll(".card")].find(
  (group) => `#${group.dataset.card}` === location.hash,
);
if (linked) show(linked);

function percent(share) {
  if (!share) return "-";
  return share < 0.0005 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`;
}

function measure(metric) {
  for (const button of document.querySelectorAll("[data-metric]")) {
    button.setAttribute("aria-pressed", String(button.dataset.metric === metric));
  }
  for (const bar of document.querySelectorAll(".bar")) {
    const share = Number(bar.getAttribute(`data-${metric}`));
    bar.setAttribute("width", (share * Number(bar.dataset.full)).toFixed(1));
    const text = bar.parentElement.querySelector(".share");
    if (text && text.textContent) text.textContent = percent(share);
    bar.closest(".card").style.setProperty("--heat", `${(30 * Math.sqrt(share)).toFixed(1)}%`);
  }
}

for (const button of document.querySelectorAll("[data-metric]")) {
  button.addEventListener("click", () => measure(button.dataset.metric));
}

document.getElementById("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
});
