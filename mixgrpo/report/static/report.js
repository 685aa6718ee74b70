"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = 8;
const hidden = new Set(); // runs that are hidden
const make = (tag, kind = "", text = "") => {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text) element.textContent = text;
  return element;
};
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---- numbers

function digits(value, step) {
  let places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const rest = step * 10 ** places;
  if (Math.abs(rest - Math.round(rest)) > 1e-6) places += 1; // steps of 2.5
  const size = value === 0 ? 0 : Math.floor(Math.log10(Math.abs(value)));
  if (value === 0 || places <= 4 || size > -3) return value.toFixed(value === 0 ? 0 : places);
  return value.toExponential(Math.max(0, size + places)).replace("e-", "e−");
}
const ticks = (plot, values, axis, space, step) => values.map(value => digits(value, step));
const shown = value => value === null || value === undefined ? "–"
  : Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(2).replace("e-", "e−") : String(Number(value.toPrecision(4)));

// ---- charts

const KINDS = {
  raw: { width: 1, alpha: 0.28, quiet: true },
  mean: { width: 1.5 },
  plain: { width: 1.5 },
  dots: { width: 2.5, points: 7 },
  dashed: { width: 1.5, dash: [6, 4], points: 5 },
  low: { width: 1.5, stepped: true },
  high: { width: 1.5, stepped: true },
  area: { width: 0 },
};

// A phase has one colour in all runs.
const phases = [...new Set(data.sections.phases.flatMap(chart => chart.lines.map(l => l.label)))];

function series(chart, line) {
  const kind = KINDS[line.kind], isArea = line.kind === "area";
  const colour = isArea ? style(`--p${phases.indexOf(line.label) % COLOURS}`)
    : style(`--c${line.run % COLOURS}`);
  // The legend shows the value under the pointer, or else the newest one.
  const told = line.shown.length ? line.shown : line.values;
  const last = told.findLastIndex(value => value !== null);
  const name = data.runs.length > 1 && !isArea ? [data.runs[line.run], line.label] : [line.label];
  return {
    label: name.filter(Boolean).join(" ") || "value",
    class: kind.quiet ? "quiet" : "shown",
    stroke: colour,
    fill: isArea ? colour : undefined,
    width: kind.width,
    alpha: kind.alpha ?? 1,
    dash: kind.dash,
    paths: kind.stepped ? uPlot.paths.stepped({ align: -1 }) : undefined,
    spanGaps: true,
    show: isArea || !hidden.has(line.run),
    points: { show: Boolean(kind.points) || chart.x.length === 1, size: kind.points ?? 6,
      fill: kind.dash ? style("--card") : colour },
    value: (plot, _, index, at) => shown(told[at ?? last]),
  };
}

// Filled between a window's first and last step.
function bands(lines) {
  const found = [];
  lines.forEach((line, place) => {
    if (line.kind === "high") {
      found.push({ series: [place + 1, place + 2], fill: style(`--c${line.run % COLOURS}`) + "40" });
    }
  });
  return found;
}

function axes(unit) {
  const common = { stroke: style("--soft"), grid: { stroke: style("--grid"), width: 1 },
    ticks: { stroke: style("--line"), width: 1, size: 4 }, font: "12px system-ui, sans-serif" };
  const wide = (plot, values) =>
    14 + 6.6 * Math.max(...(values ?? [""]).map(value => String(value).length));
  return [
    { ...common, size: 30, values: (plot, values) => values.map(v => Number.isInteger(v) ? v : "") },
    { ...common, values: ticks, size: wide, ...(unit ? { label: unit, labelSize: 18,
      labelFont: common.font, labelGap: 0 } : {}) },
  ];
}

function range(plot, low, high) {
  if (low === null) return [0, 1];
  return high === low ? [low - 0.5, high + 0.5] : [low, high];
}

// From 0 for stacked areas, otherwise slightly more than the range of the values.
const heights = isStacked => (plot, low, high) => {
  if (low === null) return [0, 1];
  if (isStacked) return [0, high * 1.05 || 1];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
  return [low - room, high + room];
};

let plots = [];

function draw(chart, place) {
  // The highest edge comes first, so that the lower areas are drawn over it.
  const isStacked = chart.lines.some(line => line.kind === "area");
  const order = isStacked ? [...chart.lines].reverse() : chart.lines;
  const options = {
    width: Math.max(place.clientWidth, 200), height: 210,
    cursor: { sync: { key: "iteration" }, y: false, points: { size: 6 } },
    scales: { x: { time: false, range }, y: { range: heights(isStacked) } },
    series: [{ label: "iteration", value: (plot, value) => value ?? chart.x.at(-1) },
      ...order.map(line => series(chart, line))],
    bands: bands(chart.lines),
    axes: axes(chart.unit),
    legend: { markers: { width: 0, fill: (plot, index) => plot.series[index].stroke() } },
  };
  const values = [chart.x, ...order.map(line => line.values)];
  const plot = new uPlot(options, values, place);
  plots.push({ plot, lines: order, place });
}

function cards() {
  const found = [];
  for (const [id, charts] of Object.entries(data.sections)) {
    const room = document.getElementById(id);
    const title = document.querySelector(`.of-${id}`);
    if (!charts.length) {
      if (title) title.remove();
      room.remove();
    }
    for (const chart of charts) {
      const card = make("article", "chart"), title = make("h4", "", chart.title);
      if (chart.key.includes("/")) title.append(make("i", "", chart.key));
      card.append(title);
      if (chart.meaning) card.append(make("p", "", chart.meaning.replaceAll("`", "")));
      if (chart.note) card.append(make("p", "note", chart.note));
      const place = make("div", "plot");
      card.append(place);
      room.append(card);
      found.push([chart, place]);
    }
  }
  return found;
}

const charts = cards();
function drawAll() {
  plots.forEach(each => each.plot.destroy());
  plots = [];
  charts.forEach(([chart, place]) => draw(chart, place));
}
drawAll();
// Canvases do not follow CSS variables.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
const seen = new ResizeObserver(() => plots.forEach(({ plot, place }) => {
  const width = Math.max(place.clientWidth, 200);
  if (plot.width !== width) plot.setSize({ width, height: 210 });
}));
seen.observe(document.querySelector("main"));

// ---- images

const album = data.album;
const iterations = run => Object.keys(album.runs[run] ?? {}).map(Number).sort((a, b) => a - b);
const all = [...new Set(data.runs.flatMap((_, run) => iterations(run)))].sort((a, b) => a - b);
const latest = (run, iteration) => iterations(run).filter(each => each <= iteration).at(-1);

function shot(run, iteration, place, caption) {
  const box = make("div", `shot c${run % COLOURS}`);
  const uri = album.runs[run][iteration]?.[place];
  if (uri) {
    const image = make("img");
    image.src = uri;
    image.alt = `${data.runs[run]}, iteration ${iteration}: ${album.prompts[place]}`;
    image.title = scoresText(run, iteration, place);
    box.append(image);
  } else {
    box.append(make("span", "none", uri === null ? "damaged" : "none"));
  }
  box.append(make("span", "", caption));
  return box;
}

function scoresText(run, iteration, place) {
  const own = Object.entries(album.scores[run][iteration]?.[place] ?? {});
  return own.map(([name, value]) => `${name} ${shown(value)}`).join("\n");
}

const stage = document.getElementById("stage");
function showStage() {
  const iteration = all[stage.value], room = document.getElementById("album");
  document.getElementById("stage-text").textContent = iteration;
  const cells = album.prompts.map((prompt, place) => {
    const runs = data.runs.map((_, run) => run).filter(run => !hidden.has(run) &&
      album.shown[run].includes(place) &&
      iterations(run).some(each => place in album.runs[run][each]));
    return [prompt, place, runs];
  }).filter(([, , runs]) => runs.length).sort((a, b) => b[2].length - a[2].length);
  room.replaceChildren(...cells.map(([prompt, place, runs]) => {
    const figure = make("figure"), row = make("div", "row");
    row.append(...runs.map(run =>
      shot(run, latest(run, iteration), place, data.runs.length > 1 ? data.runs[run] : "")));
    figure.append(row, make("figcaption", "", prompt));
    return figure;
  }));
  room.style.setProperty("--wide", `${8.5 * Math.max(1, data.runs.length - hidden.size)}rem`);
}

const TITLES = { best: "Best", worst: "Worst", improved: "Most improved: before and after" };
function showPicks() {
  const measure = document.getElementById("measure").value;
  const rooms = data.runs.flatMap((name, run) => {
    const picked = album.picks[run]?.[measure];
    if (!picked || hidden.has(run)) return [];
    const [first, last] = [iterations(run)[0], iterations(run).at(-1)];
    const row = make("div", "picks");
    for (const [kind, places] of Object.entries(picked)) {
      const room = make("div", "pick"), grid = make("div");
      room.append(make("h4", "", TITLES[kind]), grid);
      grid.append(...places.map(place => {
        const figure = make("figure"), pair = make("div", "row");
        if (kind === "improved") pair.append(shot(run, first, place, ""));
        pair.append(shot(run, last, place, ""));
        figure.append(pair, make("figcaption", "", pickText(run, measure, place, kind, first, last)));
        return figure;
      }));
      if (!places.length) grid.append(make("span", "none", "none"));
      row.append(room);
    }
    if (data.runs.length === 1) return [row];
    const title = make("h4", "", name);
    title.prepend(make("span", `chip c${run % COLOURS}`));
    return [title, row];
  });
  document.getElementById("picks").replaceChildren(...rooms);
}

function pickText(run, measure, place, kind, first, last) {
  const at = iteration => album.scores[run][iteration]?.[place]?.[measure];
  const after = at(last), before = at(first);
  if (after === undefined) return album.prompts[place];
  const score = kind === "improved" ? `${shown(before)} → ${shown(after)}` : shown(after);
  return `${score}: ${album.prompts[place]}`;
}

if (all.length) {
  stage.max = all.length - 1;
  stage.value = all.length - 1;
  stage.oninput = showStage;
  showStage();
} else {
  document.getElementById("through").replaceChildren(make("p", "", "No images were found."));
}
const measures = [...new Set(album.picks.flatMap(picked => Object.keys(picked)))];
if (measures.length) {
  const select = document.getElementById("measure");
  select.append(...measures.map(name => {
    const option = make("option", "", name === "all" ? "mean z-score of all rewards" : name);
    option.value = name;
    return option;
  }));
  select.onchange = showPicks;
  showPicks();
} else {
  document.getElementById("ranked").remove();
}

// ---- showing and hiding runs

if (data.runs.length > 1) {
  for (const box of document.querySelectorAll("[data-run]")) {
    box.hidden = false;
    box.onchange = () => {
      hidden[box.checked ? "delete" : "add"](Number(box.dataset.run));
      for (const { plot, lines } of plots) {
        lines.forEach((line, index) => {
          if (line.kind !== "area") plot.setSeries(index + 1, { show: !hidden.has(line.run) });
        });
      }
      if (all.length) showStage();
      showPicks();
    };
  }
}
