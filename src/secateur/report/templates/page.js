"use strict";
(() => {
  const { ALL, data, state, plain, percent, round, css, axis, layout, show, begin } = secateur;
  const shown = (cell) => state.methods.has(cell.method) && (cell.size === null || state.sizes.has(cell.size));

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

  begin(() => {
    const y = (cell) => cell.y[state.text];
    const title = state.text === ALL ? "perplexity over dense" : "perplexity";
    const form = state.text === ALL ? (value) => `${round(value)}×` : round;
    scatter("plot-size", (cell) => cell.parameters / 1e6, y, "parameters, millions", title, form, true);
    scatter("plot-time", (cell) => cell.wall_s, y, "pruning time, s", title, form, true);
    scatter("plot-accuracy", (cell) => cell.parameters / 1e6, (cell) => cell.accuracy, "parameters, millions", `mean ${data.metric}`, percent, false);
    inference();
    curves();
  });
})();
