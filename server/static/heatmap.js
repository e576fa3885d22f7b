/* The document as the model met it: each token as warm as the model was unsure of it.

Tokens are fetched in pages as they scroll into view, so a long document costs what is looked at. */

import { getJson } from "./api.js";
import { el, svg, visible } from "./dom.js";
import { number } from "./words.js";

const PAGE = 1500;
const LEVELS = 9;
const BEFORE = 120; // tokens shown before a place that is jumped to

export class Heatmap {
  #id;
  #profile;
  #first = 0; // the tokens on the page are #first .. #first + #spans.length
  #spans = [];
  #complete = false;
  #loading = null;
  #step = null;
  #length = 0;
  #selected = null;
  #observer;
  #generation = 0;

  /** `onSelect(position)`: a mark was pointed at, focused or pressed. */
  constructor(id, profile, onSelect) {
    this.#id = id;
    this.#profile = profile;
    this.strip = el("div", { class: "strip" });
    this.earlier = el("button", { type: "button", class: "quiet small", hidden: true,
      onclick: () => this.#jump(Math.max(0, this.#first - PAGE)) }, "Earlier text");
    this.text = el("div", { class: "heat-text", dir: "auto" });
    this.end = el("p", { class: "note heat-end" });
    this.box = el("div", { class: "heat-box", tabindex: "0", role: "region",
      "aria-label": "Text of the document with the sampled positions" },
    this.earlier, this.text, this.end);
    this.readout = el("p", { class: "note readout" }, "Point at a word to see how unsure the model was of it.");
    const select = (event) => {
      const mark = event.target.closest(".mark");
      if (mark) onSelect(Number(mark.dataset.position));
    };
    for (const kind of ["mouseover", "focusin", "click"]) this.text.addEventListener(kind, select);
    this.text.addEventListener("mouseover", (event) => this.#read(event.target));
    this.#observer = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) this.#more();
    }, { root: this.box, rootMargin: "600px" });
    this.#observer.observe(this.end);
    this.#drawStrip();
  }

  close() {
    this.#generation += 1;
    this.#observer.disconnect();
  }

  /** Mark the positions of a step; `length` tokens behind each are what it tried to write. */
  show(step, length) {
    this.#step = step;
    this.#length = length;
    this.#drawStrip();
    this.#mark();
  }

  /** Point out the mark of a position that is already shown. */
  select(position) {
    this.#selected = position;
    for (const mark of this.text.querySelectorAll(".mark")) {
      mark.classList.toggle("on", Number(mark.dataset.position) === position);
    }
    for (const span of this.text.querySelectorAll(".chosen")) span.classList.remove("chosen");
    for (let i = position; i < position + this.#length; i += 1) this.#span(i)?.classList.add("chosen");
    for (const tick of this.strip.querySelectorAll(".tick")) {
      tick.classList.toggle("on", tick.dataset.position === String(position));
    }
  }

  /** Bring a position into view, loading the text around it where that is needed. */
  async reveal(position) {
    if (!this.#span(position)) await this.#jump(Math.max(0, position - BEFORE));
    const span = this.#span(position);
    if (span) this.box.scrollTop = span.offsetTop - this.box.clientHeight / 3;
    this.select(position);
  }

  #span(token) {
    return this.#spans[token - this.#first];
  }

  async #jump(first) {
    this.#generation += 1;
    this.#loading = null;
    this.text.replaceChildren();
    this.#spans = [];
    this.#complete = false;
    this.#first = first;
    this.earlier.hidden = first === 0;
    await this.#more();
    this.box.scrollTop = 0;
  }

  #more() {
    if (this.#complete) return Promise.resolve();
    this.#loading ??= this.#load(this.#generation).finally(() => {
      this.#loading = null;
    });
    return this.#loading;
  }

  async #load(generation) {
    const after = this.#first + this.#spans.length;
    const path = `/v1/adaptations/${encodeURIComponent(this.#id)}/study/tokens`;
    const page = await getJson(`${path}?after=${after}&limit=${PAGE}`);
    if (generation !== this.#generation) return;
    const fresh = page.texts.map((text, i) => el("span",
      { class: `t h${this.#level(page.entropies[i])}` }, visible(text)));
    page.entropies.forEach((entropy, i) => {
      fresh[i].entropy = entropy;
    });
    this.#spans.push(...fresh);
    this.text.append(...fresh);
    this.#complete = !page.has_more;
    this.end.textContent = this.#complete ? "End of the document" : "Loading more …";
    this.#mark();
    // where the text is shorter than the box, the observer sees no change and would stay silent
    this.#observer.unobserve(this.end);
    this.#observer.observe(this.end);
  }

  #level(entropy) {
    if (entropy === null) return 0;
    const { low, high } = this.#profile;
    const share = high > low ? (entropy - low) / (high - low) : 0;
    return Math.min(LEVELS, Math.max(0, Math.floor(share * (LEVELS + 1))));
  }

  #mark() {
    for (const mark of this.text.querySelectorAll(".mark")) mark.remove();
    for (const span of this.text.querySelectorAll(".tried, .chosen")) {
      span.classList.remove("tried", "chosen");
    }
    this.#step?.positions.forEach(({ position }, index) => {
      const span = this.#span(position);
      if (!span) return;
      span.before(el("button", { type: "button", class: "mark", "data-position": position,
        "aria-label": `Position ${index + 1} of ${this.#step.positions.length}: show its rollouts` }));
      for (let i = position; i < position + this.#length; i += 1) this.#span(i)?.classList.add("tried");
    });
    if (this.#selected !== null) this.select(this.#selected);
  }

  #read(target) {
    if (target.entropy === undefined) return;
    const unsure = target.entropy === null
      ? "is the first token: nothing was read before it"
      : `came with ${number(target.entropy)} nats of uncertainty`;
    this.readout.replaceChildren(el("bdi", { class: "code" }, visible(target.textContent)), ` ${unsure}.`);
  }

  #drawStrip() {
    const { entropies, num_tokens: total } = this.#profile;
    const bars = entropies.map((entropy, i) => svg("rect",
      { x: i, y: 0, width: 1.05, height: 10, class: `h${this.#level(entropy)}` }));
    const ticks = (this.#step?.positions ?? []).map(({ position }) => svg("rect",
      { x: (position / total) * entropies.length - 0.35, y: -3, width: 0.7, height: 16,
        class: "tick", "data-position": position }));
    const drawing = svg("svg", { viewBox: `0 -3 ${entropies.length} 16`, preserveAspectRatio: "none",
      "aria-hidden": "true", onclick: (event) => {
        const box = event.currentTarget.getBoundingClientRect();
        const place = Math.floor(((event.clientX - box.left) / box.width) * total);
        this.#jump(Math.max(0, Math.min(place, total - BEFORE)));
      } }, bars, ticks);
    this.strip.replaceChildren(drawing);
    if (this.#selected !== null) this.select(this.#selected);
  }
}

/** What the colours mean. */
export function legend(profile) {
  const cells = Array.from({ length: LEVELS + 1 }, (_, i) => el("span", { class: `t h${i}` }, "\u00a0"));
  return el("p", { class: "legend", "aria-hidden": "true" }, `sure (${number(profile.low, 1)} nats)`,
    el("span", { class: "scale" }, cells), `unsure (${number(profile.high, 1)} nats)`);
}
