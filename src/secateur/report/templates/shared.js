"use strict";
const secateur = (() => {
  const data = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const ALL = "*";
  const state = {
    text: data.start, // or another measure: what is plotted
    sizes: new Set(data.sparsities),
    methods: new Set(data.methods.map((method) => method.key)),
  };
  let redraw = () => {};
  const each = (selector, act) => document.querySelectorAll(selector).forEach(act);
  const percent = (share) => `${Number((100 * share).toFixed(1))}\u00a0%`;
  // plotly reads a few tags in its labels; those of a user's or a model's are to be seen, not read
  const plain = (words) => String(words).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const round = (value) => Number(value.toPrecision(3)).toLocaleString("en");

  // --- what is shown ---

  function filter() {
    each("[data-method]:not(button), [data-size]:not(button)", (element) => {
      const { method, size } = element.dataset;
      const off = (method !== undefined && !state.methods.has(method)) || (size !== undefined && !state.sizes.has(Number(size)));
      element.classList.toggle("off", off);
    });
    each("#table [data-text]", (element) =>
      element.classList.toggle("off", state.text !== ALL && element.dataset.text !== state.text));
    redraw();
  }

  function toggles(group, chosen, key) {
    each(`#${group} button`, (button) => button.addEventListener("click", () => {
      const value = key(button);
      chosen.has(value) ? chosen.delete(value) : chosen.add(value);
      button.setAttribute("aria-pressed", chosen.has(value));
      filter();
    }));
  }
  toggles("sizes", state.sizes, (button) => Number(button.dataset.size));
  toggles("methods", state.methods, (button) => button.dataset.method);
  each("#texts button", (button) => button.addEventListener("click", () => {
    state.text = button.dataset.text;
    each("#texts button", (other) => other.setAttribute("aria-checked", other === button));
    filter();
  }));

  // --- the table ---

  const body = document.querySelector(".main tbody");
  const order = [...body.rows];
  each(".main thead th", (heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const turns = { none: "ascending", ascending: "descending", descending: "none" };
    const turn = turns[heading.getAttribute("aria-sort")];
    each(".main thead th", (other) => other.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", turn);
    const sign = turn === "descending" ? -1 : 1;
    const value = (row) => row.cells[column]?.dataset.sort;
    const sorted = turn === "none" ? order : [...order].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // unmeasured ones last
      const difference = Number(x) - Number(y);
      return sign * (Number.isNaN(difference) ? x.localeCompare(y) : difference);
    });
    body.append(...sorted);
  }));

  // --- the plots ---

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  /* Some round numbers for a log axis: evenly spaced where it is short. */
  function ticks(values) {
    const low = 0.93 * Math.min(...values), high = 1.07 * Math.max(...values);
    const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
    for (const steps of [[1], [1, 3], [1, 2, 5]]) {
      const found = [];
      for (let decade = from; decade < to; decade++) found.push(...steps.map((step) => step * 10 ** decade));
      const inside = found.filter((value) => value >= low && value <= high);
      if (inside.length >= 4) return inside.filter((_, number) => number % Math.ceil(inside.length / 8) === 0);
    }
    const size = 10 ** Math.floor(Math.log10((high - low) / 4));
    const step = [1, 2, 5, 10].map((n) => n * size).find((each) => (high - low) / each <= 7);
    const inside = [];
    for (let n = Math.ceil(low / step); n * step <= high; n++) inside.push(n * step);
    return inside;
  }

  function axis(title, values, log) {
    const shared = {
      title: { text: title, font: { size: 13 }, standoff: 12 }, gridcolor: css("--line"), linecolor: css("--line"), zeroline: false,
      automargin: true, fixedrange: matchMedia("(pointer: coarse)").matches,
    };
    if (!log) return shared;
    const at = ticks(values);
    const low = Math.log10(Math.min(...values)), high = Math.log10(Math.max(...values));
    const room = Math.max(0.02, 0.07 * (high - low));
    return { ...shared, type: "log", tickvals: at, ticktext: at.map(round), range: [low - room, high + room] };
  }

  const layout = (x, y, more) => ({
    xaxis: x, yaxis: y, showlegend: false, margin: { l: 56, r: 14, t: 14, b: 46 },
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { color: css("--soft"), size: 12.5, family: "inherit" },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink"), size: 13 }, align: "left" },
    modebar: { bgcolor: "transparent", color: css("--soft"), activecolor: css("--ink") }, hovermode: "closest", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", ...more,
  });
  const config = {
    responsive: true, displaylogo: false, displayModeBar: matchMedia("(pointer: coarse)").matches ? false : "hover",
    modeBarButtons: [["toImage", "resetScale2d"]],
  };

  function show(id, traces, shape) {
    const element = document.getElementById(id);
    element.closest("figure").classList.toggle("off", traces.length === 0);
    if (traces.length) Plotly.react(element, traces, shape, config);
  }

  // --- light, dark, or as the system has it ---

  const scheme = document.getElementById("scheme");
  scheme.addEventListener("click", () => {
    const next = { auto: "light", light: "dark", dark: "auto" }[scheme.textContent];
    scheme.textContent = next;
    if (next === "auto") delete root.dataset.scheme;
    else root.dataset.scheme = next;
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());

  /* plotly.js lies in the page compressed, which makes the page a third as large. */
  async function unpack() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    filter();
    root.dataset.ready = "yes";
  }

  /* What a page draws, anew at every change; its plots come once plotly is there. */
  function begin(draw) {
    redraw = () => { if (window.Plotly) draw(); };
    unpack();
  }

  return { ALL, data, state, plain, percent, round, css, axis, layout, show, begin };
})();
