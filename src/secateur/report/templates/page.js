"use strict";
const each = (selector, act) => document.querySelectorAll(selector).forEach(act);

/* The switches hide rows, cards, and marks in the pictures, by method and by size. */
const hidden = { method: new Set(), size: new Set() };
each("#controls button", (button) => button.addEventListener("click", () => {
  const kind = button.dataset.of, value = button.value;
  if (!hidden[kind].delete(value)) hidden[kind].add(value);
  button.setAttribute("aria-pressed", !hidden[kind].has(value));
  each("[data-method], [data-size]", (element) => {
    const { method, size } = element.dataset;
    element.classList.toggle("off", hidden.method.has(method) || hidden.size.has(size));
  });
}));

/* A heading sorts: up, down, and back; what was not measured stays last. */
const body = document.querySelector(".main tbody"), order = [...body.rows];
each(".main thead th", (heading, column) => heading.querySelector("button").addEventListener("click", () => {
  const turn = { none: "ascending", ascending: "descending", descending: "none" }[heading.getAttribute("aria-sort")];
  each(".main thead th", (other) => other.setAttribute("aria-sort", "none"));
  heading.setAttribute("aria-sort", turn);
  const value = (row) => row.cells[column]?.dataset.sort;
  body.append(...(turn === "none" ? order : [...order].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const difference = Number(x) - Number(y);
    return (turn === "descending" ? -1 : 1) * (Number.isNaN(difference) ? x.localeCompare(y) : difference);
  })));
}));

/* Light, dark, or as the system has it. */
document.getElementById("scheme").addEventListener("click", ({ target }) => {
  target.textContent = { auto: "light", light: "dark", dark: "auto" }[target.textContent];
  document.documentElement.dataset.scheme = target.textContent;
});
