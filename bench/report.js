"use strict";

// Tooltips: of the point that is nearest to the pointer, or, with the arrow keys, of a chart that has the focus.
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
  const at = mark.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const left = Math.min(at.left + at.width / 2 - box.width / 2, document.documentElement.clientWidth - box.width - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${at.top > box.height + 16 ? at.top - box.height - 8 : at.bottom + 8}px`;
}

function distance(mark, event) {
  const at = mark.getBoundingClientRect();
  return Math.hypot(at.left + at.width / 2 - event.clientX, at.top + at.height / 2 - event.clientY);
}

for (const plot of document.querySelectorAll("svg.plot")) {
  const marks = [...plot.querySelectorAll(".mark")];
  for (const mark of marks) {
    const title = mark.querySelector("title");
    mark.dataset.tip = title.textContent;
    title.remove(); // the browser's own would come on top
  }
  const visible = () => marks.filter((mark) => !mark.classList.contains("out"));
  const point = (event) => {
    const found = visible().map((mark) => [distance(mark, event), mark]).sort((one, other) => one[0] - other[0])[0];
    if (found && found[0] < 40) show(found[1]);
    else hide();
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", hide);
  plot.tabIndex = 0;
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && visible().length && show(visible().at(-1)));
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const all = visible(), at = all.indexOf(shown);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined || !all.length) return;
    event.preventDefault();
    show(all[Math.max(0, Math.min(to, all.length - 1))]);
  });
}
addEventListener("scroll", hide, { passive: true });

// The filter hides all that is about other cases.
const label = document.getElementById("filter"), input = label.querySelector("input");
const count = document.getElementById("count"), about = [...document.querySelectorAll("[data-case]")];
label.hidden = false;
input.addEventListener("input", () => {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const element of about) {
    element.classList.toggle("out", !words.every((word) => element.dataset.case.includes(word)));
  }
  const cards = [...document.querySelectorAll(".cards [data-case]")];
  const left = cards.filter((card) => !card.classList.contains("out")).length;
  count.textContent = words.length ? `${left} of ${cards.length} cases` : "";
});
