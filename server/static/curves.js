/* Numbers of the steps as small line charts, each with its values as a table for who cannot see it. */

import { el, svg } from "./dom.js";
import { number } from "./words.js";

const WIDTH = 240;
const HEIGHT = 128;
const LEFT = 46;
const RIGHT = 10;
const TOP = 12;
const BOTTOM = 22;

const CHARTS = [
  {
    title: "Reward", hint: "higher is better", name: "reward_mean", spread: "reward_std",
    about: "Share of the true continuation that rollouts hit, on average",
  },
  {
    title: "Next-token loss", hint: "nats, lower is better", name: "ntp_loss",
    about: "How hard the true text at the sampled positions was",
  },
  {
    title: "Policy loss", hint: "near 0 by design", name: "policy_loss", least: 1e-4,
    about: "The rewards push the model by its slope; what is far below a thousandth is rounding",
  },
  {
    title: "Probe", hint: "nats, lower is better", name: "probe_nats", base: "probe_base_nats",
    about: "Recall at the places that judge the study; the dashed line is the unchanged model",
  },
];

export class Curves {
  #points = [];
  #steps = 1;

  constructor() {
    this.charts = CHARTS.map((chart) => ({ chart, figure: el("figure", { class: "curve card" }) }));
    this.table = el("table", {});
    this.element = el("div", {},
      el("div", { class: "curves" }, this.charts.map(({ figure }) => figure)),
      el("details", { class: "options" }, el("summary", {}, "The same as a table"),
        el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Numbers of each step" },
          this.table)));
    this.#draw();
  }

  /** A step's numbers, in order; a step that is told again is ignored. */
  add(event) {
    if (event.step <= (this.#points.at(-1)?.step ?? 0)) return;
    this.#points.push(rounded(event));
    this.#steps = Math.max(event.steps ?? 1, event.step, this.#steps);
    this.#draw();
  }

  #draw() {
    for (const { chart, figure } of this.charts) figure.replaceChildren(...this.#chart(chart));
    const names = CHARTS.map(({ name }) => name);
    this.table.replaceChildren(
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Step"),
        CHARTS.map(({ title }) => el("th", { scope: "col" }, title)))),
      el("tbody", {}, this.#points.map((point) => el("tr", {},
        el("th", { scope: "row" }, String(point.step)),
        names.map((name) => el("td", {}, number(point[name], 4)))))));
  }

  #chart(chart) {
    const points = this.#points.filter((point) => Number.isFinite(point[chart.name]));
    const last = points.at(-1);
    const caption = el("figcaption", {},
      el("span", { class: "curve-title" }, chart.title, el("span", { class: "hint" }, chart.hint)),
      el("span", { class: "curve-value" }, last ? number(last[chart.name], 3) : "–"));
    if (!last) {
      const why = this.#points.length ? "Nothing is rolled out in this study" : "No step yet";
      return [caption, el("p", { class: "note curve-empty" }, why)];
    }
    const first = points[0];
    const summary = `${chart.title} after step ${first.step}: ${number(first[chart.name], 3)}, after step ` +
      `${last.step}: ${number(last[chart.name], 3)}. ${chart.about}.`;
    return [caption, svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": summary },
      this.#lines(chart, points))];
  }

  #lines(chart, points) {
    const band = (point) => (chart.spread ? point[chart.spread] ?? 0 : 0);
    const base = chart.base ? points[0][chart.base] : null;
    // a spread that reaches below nothing would be read as negative rewards
    const under = (point) => Math.max(point[chart.name] - band(point), Math.min(0, point[chart.name]));
    const values = points.flatMap((point) => [chart.spread ? under(point) : point[chart.name],
      point[chart.name] + band(point)]);
    if (Number.isFinite(base)) values.push(base);
    const [low, high] = padded(Math.min(...values), Math.max(...values), chart.spread, chart.least);
    const digits = Math.min(4, Math.max(2, Math.ceil(-Math.log10(high - low)) + 1)); // so that they differ
    const x = (step) => LEFT + ((WIDTH - LEFT - RIGHT) * (step - 1)) / Math.max(1, this.#steps - 1);
    const y = (value) => TOP + ((HEIGHT - TOP - BOTTOM) * (high - value)) / (high - low);
    const path = (pairs) => pairs.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
    const parts = [high, low].map((value) => svg("g", {},
      svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 6, y: y(value) + 3.5, "text-anchor": "end" }, number(value, digits))));
    parts.push(svg("text", { x: LEFT, y: HEIGHT - 6 }, "step 1"),
      svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, String(this.#steps)));
    if (chart.spread) {
      const upper = points.map((point) => [x(point.step), y(point[chart.name] + band(point))]);
      const lower = points.map((point) => [x(point.step), y(under(point))]).reverse();
      parts.push(svg("path", { class: "band", d: `${path([...upper, ...lower])}Z` }));
    }
    if (Number.isFinite(base)) {
      parts.push(svg("line", { class: "base", x1: LEFT, x2: WIDTH - RIGHT, y1: y(base), y2: y(base) }));
    }
    const line = points.map((point) => [x(point.step), y(point[chart.name])]);
    parts.push(svg("path", { class: "line", d: path(line) }),
      ...line.map(([cx, cy], i) => svg("circle", { class: "dot", cx, cy, r: i === line.length - 1 ? 3.6 : 2 })));
    return parts;
  }
}

/** A step's numbers, without those that say nothing. */
function rounded(event) {
  const small = CHARTS.filter(({ name, least }) => least && Math.abs(event[name]) < least);
  return { ...event, ...Object.fromEntries(small.map(({ name }) => [name, 0])) };
}

/** A little room on both sides; a range that `starts` at nothing, or above, stays there. */
function padded(low, high, starts, least = 1e-9) {
  const room = (high - low) * 0.08 || Math.abs(high) * 0.05 || least;
  return [starts && low >= 0 ? 0 : low - room, high + room];
}
