/* One position of a step: what the model wrote there, beside what stands in the document. */

import { el, quoted, svg } from "./dom.js";
import { count, number } from "./words.js";

export class Branches {
  #step = null;
  #index = 0;
  #onSelect;

  /** `onSelect(position)`: a position was asked for, with the buttons here. */
  constructor(onSelect) {
    this.#onSelect = onSelect;
    this.body = el("div", { class: "branch" });
    this.previous = el("button", { type: "button", class: "quiet small", onclick: () => this.#go(-1) }, "Previous");
    this.next = el("button", { type: "button", class: "quiet small", onclick: () => this.#go(1) }, "Next");
    this.where = el("p", { class: "where" });
    this.all = el("div", {});
    this.find = el("button", { type: "button", class: "quiet small",
      onclick: () => this.#onSelect(this.position) }, "Show in the text");
    this.element = el("section", { class: "card branches", "aria-label": "Rollouts at a position" },
      el("div", { class: "row" }, this.where, el("span", { class: "grow" }), this.previous, this.next),
      this.body, this.find);
    this.list = el("details", { class: "options" },
      el("summary", {}, "All positions of this step as a table"),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Positions of this step" }, this.all));
  }

  show(step) {
    const kept = this.#step && this.#step.positions[this.#index]?.position;
    this.#step = step;
    this.#index = Math.max(0, step.positions.findIndex(({ position }) => position === kept));
    this.#draw();
    this.all.replaceChildren(table(step));
  }

  get position() {
    return this.#step?.positions[this.#index]?.position ?? null;
  }

  select(position) {
    const index = this.#step.positions.findIndex((item) => item.position === position);
    if (index < 0 || index === this.#index) return;
    this.#index = index;
    this.#draw();
  }

  #go(by) {
    const num = this.#step.positions.length;
    this.#index = (this.#index + by + num) % num;
    this.#draw();
    this.#onSelect(this.position);
  }

  #draw() {
    const { positions, num_positions: num } = this.#step;
    const item = positions[this.#index];
    this.previous.disabled = this.next.disabled = positions.length < 2;
    this.find.hidden = !item;
    if (!item) {
      this.where.textContent = "No positions";
      this.body.replaceChildren();
      return;
    }
    const left = num > positions.length ? ` (of ${count(num, "position")}, an even sample is kept)` : "";
    this.where.textContent = `Position ${this.#index + 1} of ${positions.length}${left}`;
    const best = Math.max(...item.rollouts.map(({ reward }) => reward ?? 0));
    const most = Math.max(...positions.flatMap(({ rollouts }) => rollouts.map(({ reward }) => reward ?? 0)));
    this.body.replaceChildren(
      el("dl", {},
        el("dt", {}, "Cue"), el("dd", {}, quoted(item.cue, { class: "code faint" })),
        el("dt", {}, "Truth"), el("dd", {}, quoted(item.truth, { class: "code truth" })),
        el("dt", {}, "Rollouts"),
        el("dd", {}, item.rollouts.length ? el("ol", { class: "rollouts" },
          item.rollouts.map((rollout) => rolled(rollout, best, most))) : "None: this study writes none.")));
  }
}

/** `best` of its position is pointed out; its bar is a share of the `most` of the step. */
function rolled({ text, reward }, best, most) {
  const isBest = reward !== null && reward > 0 && reward === best;
  return el("li", { class: isBest && "best" },
    quoted(text, { class: "code" }),
    el("span", { class: "reward" },
      svg("svg", { class: "share", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
        svg("rect", { width: most > 0 ? (100 * Math.max(0, reward ?? 0)) / most : 0, height: 10 })),
      el("span", {}, el("span", { class: "visually-hidden" }, "reward "), number(reward, 3),
        isBest ? el("span", { class: "visually-hidden" }, ", the best of them") : null)));
}

function table(step) {
  return el("table", {},
    el("thead", {}, el("tr", {}, ["Token", "Cue", "Truth", "Best rollout", "Reward"]
      .map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, step.positions.map(({ position, cue, truth, rollouts }) => {
      const best = rollouts.reduce((a, b) => ((b.reward ?? 0) > (a?.reward ?? -1) ? b : a), null);
      return el("tr", {}, el("th", { scope: "row" }, String(position)),
        [cue, truth, best?.text ?? "–"].map((text) => el("td", {}, quoted(text, { class: "code" }))),
        el("td", {}, number(best?.reward, 3)));
    })));
}
