"use strict";

// Tooltips: for the point nearest to the pointer or, with the arrow keys, for the points of the chart that has the focus.
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
tip.setAttribute("role", "status");
let shown = null;

function hide() {
  shown?.classList.remove("on");
  shown = null;
  tip.classList.remove("on");
}

function show(mark) {
  if (mark === shown) return;
  hide();
  shown = mark;
  mark.classList.add("on");
  tip.textContent = mark.dataset.tip;
  tip.classList.add("on");
  place();
}

function place() {
  if (!shown) return;
  const at = shown.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const left = Math.min(at.left + at.width / 2 - box.width / 2, document.documentElement.clientWidth - box.width - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${at.top > box.height + 16 ? at.top - box.height - 8 : at.bottom + 8}px`;
}

function visible(plot) {
  return [...plot.querySelectorAll(".mark:not(.out)")];
}

function nearest(plot, x, y) {
  const far = (mark) => {
    const at = mark.getBoundingClientRect();
    return Math.hypot(at.left + at.width / 2 - x, at.top + at.height / 2 - y);
  };
  const found = visible(plot).map((mark) => [far(mark), mark]).sort((one, other) => one[0] - other[0])[0];
  return found && found[0] < 40 ? found[1] : null;
}

let rest = "";
function point(event) {
  const now = `${event.type} ${event.clientX} ${event.clientY}`;
  if (now === rest) return; // the page scrolled by keyboard; the pointer did not move
  rest = now;
  const plot = event.target.closest("svg.plot");
  const mark = plot && nearest(plot, event.clientX, event.clientY);
  if (mark) show(mark);
  else if (!document.activeElement.closest("svg.plot")?.contains(shown)) hide();
}

addEventListener("pointermove", point);
addEventListener("pointerdown", point);
addEventListener("scroll", place, { passive: true });
addEventListener("resize", place);
for (const title of document.querySelectorAll(".plot .mark title")) {
  title.parentElement.dataset.tip = title.textContent;
  title.remove(); // the browser would show its own tooltip, too
}
for (const plot of document.querySelectorAll("svg.plot")) {
  plot.tabIndex = 0;
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && visible(plot).length && show(visible(plot).at(-1)));
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const all = visible(plot), at = all.indexOf(shown);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined || !all.length) return;
    event.preventDefault();
    show(all[Math.max(0, Math.min(to, all.length - 1))]);
  });
}

// The filter hides everything about other cases.
const label = document.getElementById("filter"), input = label.querySelector("input");
const count = document.getElementById("count"), about = [...document.querySelectorAll("[data-case]")];
const boxes = [...document.querySelectorAll(":is(.group, tbody, .card, .trouble):not([data-case])")]
  .map((box) => [box, [...box.querySelectorAll("[data-case]")]]).filter(([, inside]) => inside.length);
const folded = [...document.querySelectorAll("details:not([open]):has(.cards)")]; // open while something is searched
const out = (element) => element.classList.contains("out");
label.hidden = false;
input.addEventListener("input", () => {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const element of about) {
    element.classList.toggle("out", !words.every((word) => element.dataset.case.includes(word)));
  }
  for (const [box, inside] of boxes) box.classList.toggle("out", inside.every(out));
  for (const histories of folded) histories.open = words.length > 0;
  const cards = [...document.querySelectorAll(".cards [data-case]")];
  const left = cards.filter((card) => !out(card)).length;
  count.textContent = words.length ? `${left} of ${cards.length} cases` : "";
});
