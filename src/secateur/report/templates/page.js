"use strict";
(() => {
  const data = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const ALL = "*";
  const state = {
    text: data.texts.length > 1 ? ALL : data.texts[0],
    sizes: new Set(data.sparsities),
    methods: new Set(data.methods.map((method) => method.key)),
  };
  const each = (selector, act) => document.querySelectorAll(selector).forEach(act);
  const percent = (share) => `${Number((100 * share).toFixed(1))}\u00a0%`;
  // plotly reads a few tags in its labels; those of a user's or a model's are to be seen, not read
  const plain = (words) => String(words).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const round = (value) => Number(value.toPrecision(3)).toLocaleString("en");

  // --- what is shown ---

  const shown = (cell) => state.methods.has(cell.method) && (cell.size === null || state.sizes.has(cell.size));

  function filter() {
    each("[data-method]:not(button)", (element) => {
      const { method, size } = element.dataset;
      element.classList.toggle("off", !state.methods.has(method) || (size !== undefined && !state.sizes.has(Number(size))));
    });
    each(".card[data-size]", (card) => card.classList.toggle("off", !state.sizes.has(Number(card.dataset.size))));
    each("#table [data-text]", (element) =>
      element.classList.toggle("off", state.text !== ALL && element.dataset.text !== state.text));
    draw();
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
      return sign * (column === 0 ? x.localeCompare(y) : Number(x) - Number(y));
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

  const interval = ([value, low, high], form) =>
    low === high ? form(value) : `${form(value)} (95 %: ${form(low)} to ${form(high)})`;

  function about(cell, line) {
    const name = `<b>${plain(cell.label)}</b>${cell.size === null ? "" : `, ${plain(cell.removed)} removed`}`;
    const time = cell.wall_s === null ? "" : `<br>pruned in ${round(cell.wall_s)} s`;
    return `${name}<br>${line}<br>${round(cell.parameters / 1e6)} M parameters${time}${cell.reduced ? "<br>reduced search" : ""}`;
  }

  /* A line per method through its sizes; hollow markers for 2SSP at another method's size. */
  function scatter(id, x, y, xTitle, yTitle, form, log) {
    const traces = [], xs = [], ys = [];
    const known = data.cells.filter((cell) => shown(cell) && x(cell) > 0 && y(cell));
    for (const method of data.methods) {
      for (const matched of [false, true]) {
        const cells = known.filter((cell) => cell.method === method.key && cell.matched === matched)
          .sort((a, b) => a.size - b.size);
        if (!cells.length) continue;
        const points = cells.map(y);
        xs.push(...cells.map(x));
        ys.push(...points.flat());
        traces.push({
          name: plain(method.name), mode: matched ? "markers" : "lines+markers", x: cells.map(x), y: points.map((p) => p[0]),
          error_y: {
            type: "data", symmetric: false, array: points.map((p) => p[2] - p[0]), arrayminus: points.map((p) => p[0] - p[1]),
            thickness: 1.2, width: 0, color: method.colour,
          },
          line: { color: method.colour, width: 2, dash: cells.some((cell) => cell.reduced) ? "dot" : "solid" },
          marker: { symbol: matched ? `${method.symbol}-open` : method.symbol, size: 10, color: method.colour, line: { width: 2 * matched } },
          hovertext: cells.map((cell, number) => about(cell, `${yTitle} ${interval(points[number], form)}`)),
          hoverinfo: "text",
        });
      }
    }
    const dense = data.dense && y(data.dense);
    const shapes = [];
    if (dense && traces.length) {
      ys.push(dense[0]);
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: dense[0], y1: dense[0], line: { color: css("--soft"), dash: "dot", width: 1.3 } });
      if (id !== "plot-time") {
        xs.push(x(data.dense));
        traces.push({
          mode: "markers", x: [x(data.dense)], y: [dense[0]], marker: { symbol: "star", size: 14, color: css("--ink") },
          hovertext: [about(data.dense, `${yTitle} ${interval(dense, form)}`)], hoverinfo: "text",
        });
      }
    }
    show(id, traces, layout(axis(xTitle, xs, true), axis(yTitle, ys, log), { shapes }));
  }

  function inference() {
    const cells = data.cells.filter((cell) => shown(cell) && !cell.matched && Object.keys(cell.speed).length);
    const methods = Object.fromEntries(data.methods.map((method) => [method.key, method]));
    const rows = cells.map((cell) => `${plain(methods[cell.method].name)}, ${percent(cell.size)}`);
    const traces = [["prefill", "prefill ms", "circle"], ["token", "ms per token", "circle-open"]].map(([kind, name, symbol]) => {
      const found = cells.map((cell, row) => [cell, row, cell.speed[kind]]).filter((entry) => entry[2]);
      return {
        name, mode: "markers", x: found.map((entry) => entry[2][0]), y: found.map((entry) => entry[1]),
        error_x: {
          type: "data", symmetric: false, array: found.map((e) => e[2][2] - e[2][0]), arrayminus: found.map((e) => e[2][0] - e[2][1]),
          thickness: 1.2, width: 0, color: css("--soft"),
        },
        marker: { symbol, size: 11, color: found.map((entry) => methods[entry[0].method].colour), line: { width: 2 * (kind === "token") } },
        hovertext: found.map(([cell, , [ratio, , , ms]]) =>
          `<b>${plain(cell.label)}</b>, ${plain(cell.removed)} removed<br>${name}: ${round(ms)}, ${round(ratio)}× dense`),
        hoverinfo: "text",
      };
    }).filter((trace) => trace.x.length);
    const lines = [{ type: "line", yref: "paper", y0: 0, y1: 1, x0: 1, x1: 1, line: { color: css("--soft"), dash: "dot", width: 1.3 } }];
    document.getElementById("inference").classList.toggle("off", !data.cells.some((cell) => Object.keys(cell.speed).length));
    const element = document.getElementById("plot-inference");
    element.style.height = `${80 + 25 * rows.length}px`;
    const names = { tickvals: rows.map((_, row) => row), ticktext: rows, range: [rows.length - 0.4, -0.6], fixedrange: true };
    show("plot-inference", traces, layout(axis("time, × dense", [], false), { ...axis("", [], false), ...names }, {
      shapes: lines, margin: { l: 40, r: 14, t: 30, b: 46 },
    }));
  }

  function curves() {
    const methods = Object.fromEntries(data.methods.map((method) => [method.key, method]));
    const traces = data.cells.filter((cell) => shown(cell) && cell.curve.length > 1).map((cell) => ({
      name: percent(cell.size), mode: "lines", x: cell.curve.map((point) => point[0]), y: cell.curve.map((point) => point[1]),
      line: { color: methods[cell.method].colour, width: 2, dash: ["solid", "dash", "dot"][data.sparsities.indexOf(cell.size) % 3] },
      hovertext: cell.curve.map((point) => `<b>${plain(cell.label)}</b>, ${percent(cell.size)}<br>generation ${point[0]}: ${round(point[1])}`),
      hoverinfo: "text",
    }));
    show("plot-curve", traces, layout(axis("generation", [], false), axis("loss, nats", [], false), {
      showlegend: true, legend: { x: 0.98, xanchor: "right", y: 0.95, yanchor: "top" },
    }));
  }

  function draw() {
    if (!window.Plotly) return;
    const y = (cell) => cell.y[state.text];
    const title = state.text === ALL ? "perplexity over dense" : "perplexity";
    const form = state.text === ALL ? (value) => `${round(value)}×` : round;
    scatter("plot-size", (cell) => cell.parameters / 1e6, y, "parameters, millions", title, form, true);
    scatter("plot-time", (cell) => cell.wall_s, y, "pruning time, s", title, form, true);
    scatter("plot-accuracy", (cell) => cell.parameters / 1e6, (cell) => cell.accuracy, "parameters, millions", `mean ${data.metric}`, percent, false);
    inference();
    curves();
  }

  // --- light, dark, or as the system has it ---

  const scheme = document.getElementById("scheme");
  scheme.addEventListener("click", () => {
    const next = { auto: "light", light: "dark", dark: "auto" }[scheme.textContent];
    scheme.textContent = next;
    if (next === "auto") delete root.dataset.scheme;
    else root.dataset.scheme = next;
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

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
  unpack();
})();
