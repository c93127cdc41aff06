"use strict";
(() => {
  const { data, state, plain, percent, round, axis, layout, show, begin } = secateur;

  /* As many of the values as there is room for, the default among them. */
  function ticked(values, most) {
    const step = Math.ceil(values.length / most);
    const own = Math.max(0, values.findIndex((value) => value.default));
    return values.filter((_, place) => (place - own) % step === 0);
  }

  /* A name that leaves the plot its room: a text's may be any file's. */
  const cut = (name) => (name.length <= 24 ? name : `${name.slice(0, 23)}…`);

  /* Words break where they may: plotly leaves out labels that would touch. */
  const label = (value, plot) => (plot.numbers ? value.shown : plain(cut(value.shown)).replaceAll("-", "-<br>"));

  /* The values themselves are the ticks. */
  function across(plot, element) {
    const values = ticked(plot.values, element.clientWidth < 420 ? 6 : 12);
    const shared = {
      ...axis(plain(cut(plot.what)), [], false), tickvals: values.map((value) => value.x),
      ticktext: values.map((value) => label(value, plot) + (value.default ? "<br><b>default</b>" : "")),
    };
    if (!plot.numbers) return { ...shared, range: [-0.6, plot.values.length - 0.4] };
    return plot.log ? { ...shared, type: "log" } : shared;
  }

  function traces(plot, line, measure) {
    const size = data.sizes.find((each) => each.size === line.size);
    const form = measure.share ? percent : round;
    const name = plain(size.name);
    const known = line.points.filter((point) => point.y[measure.key]);
    const at = (point) => plot.values[point.value].x;
    const y = (point) => point.y[measure.key];
    const drawn = [false, true].map((hollow) => known.filter((point) => point.hollow === hollow)).filter((some) => some.length);
    const means = drawn.map((points) => ({
      name, x: points.map(at), y: points.map((point) => y(point).mean),
      mode: plot.numbers && !points[0].hollow ? "lines+markers" : "markers",
      error_y: { type: "data", array: points.map((point) => y(point).sd ?? 0), thickness: 1.4, width: 4, color: size.colour },
      line: { color: size.colour, width: 2 },
      marker: { symbol: points[0].hollow ? `${size.symbol}-open` : size.symbol, size: 10, color: size.colour, line: { width: 2 * points[0].hollow } },
      hovertext: points.map((point) => {
        const { mean, sd, each } = y(point);
        const spread = sd === null ? "" : ` ± ${measure.share ? percent(sd) : Number(sd.toPrecision(2))} over ${Object.keys(each).length} seeds`;
        const against = point.against[measure.key] ? `<br>against the default: ${plain(point.against[measure.key])}` : "";
        return `<b>${plain(plot.values[point.value].shown)}</b>, ${name} removed<br>${plain(measure.title)} ${form(mean)}${spread}${against}`;
      }),
      hoverinfo: "text",
    }));
    const seeds = known.flatMap((point) => Object.entries(y(point).each).map(([seed, value]) => [at(point), value, seed, point]));
    return [...means, {
      name: `${name}, seeds`, mode: "markers", x: seeds.map((each) => each[0]), y: seeds.map((each) => each[1]),
      marker: { size: 4, color: size.colour, opacity: 0.55 },
      hovertext: seeds.map(([, value, seed, point]) => `${plain(plot.values[point.value].shown)}, seed ${plain(seed)}: ${form(value)}`),
      hoverinfo: "text",
    }];
  }

  begin(() => {
    const measure = data.measures.find((each) => each.key === state.text);
    data.plots.forEach((plot, number) => {
      const lines = measure ? plot.lines.filter((line) => line.points.some((point) => point.y[measure.key])) : [];
      const shown = lines.filter((line) => state.sizes.has(line.size)).flatMap((line) => traces(plot, line, measure));
      const heights = shown.flatMap((trace) => trace.y);
      const id = `plot-${number}`;
      const up = measure ? axis(plain(measure.title), heights, measure.log && heights.length > 0) : {};
      if (measure?.share) up.tickformat = ".1%";
      show(id, shown, layout(across(plot, document.getElementById(id).closest("section")), up));
    });
  });
})();
