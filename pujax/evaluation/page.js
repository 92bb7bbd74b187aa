
"use strict";
// Shows the cards of each browser that pass its filters, a few at a time.
const browsers = [...document.querySelectorAll(".browser")].map((section) => {
  const order = section.dataset.order.split("\x1f");
  const cards = [...section.querySelectorAll("article")];
  const marks = cards.map((card) => card.dataset.marks.split("\x1f"));
  const selects = [...section.querySelectorAll("select")];
  const size = Number(section.dataset.page);
  let start = 0;

  function show() {
    const kept = cards.filter((card, at) =>
      selects.every((s) => s.value === "" || marks[at][order.indexOf(s.dataset.mark)] === s.value));
    start = Math.max(0, Math.min(start, Math.floor((kept.length - 1) / size) * size));
    const shown = new Set(kept.slice(start, start + size));
    for (const card of cards) card.hidden = !shown.has(card);
    const end = Math.min(start + size, kept.length);
    section.querySelector("output").textContent =
      kept.length === 0 ? "none" : `${start + 1}–${end} of ${kept.length}`;
  }

  function turn(by) {
    start += by * size;
    show();
  }

  for (const select of selects) {
    select.addEventListener("change", () => { start = 0; show(); });
  }
  for (const button of section.querySelectorAll("button")) {
    button.addEventListener("click", () => turn(Number(button.dataset.turn)));
  }
  section.querySelector(".controls").hidden = false;
  show();
  return { section, turn };
});

// The browser that the keys turn: the one whose upper edge the reader has last gone past.
function current() {
  const middle = window.innerHeight / 2;
  const above = browsers.filter((b) => b.section.getBoundingClientRect().top <= middle);
  return above.length === 0 ? browsers[0] : above[above.length - 1];
}

document.addEventListener("keydown", (event) => {
  const by = { n: 1, ArrowRight: 1, p: -1, ArrowLeft: -1 }[event.key];
  if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("select, input, textarea") || browsers.length === 0) return;
  const browser = current();
  browser.turn(by);
  browser.section.scrollIntoView({ block: "start" });
  event.preventDefault();
});
