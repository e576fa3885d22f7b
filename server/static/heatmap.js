/* The document as the model met it: each token as warm as the model was unsure of it.

Knows what is marked on the text; which part of it is in the document at all is for pages.js. */

import { getJson } from "./api.js";
import { el, svg, visible } from "./dom.js";
import { TextPages } from "./pages.js";
import { number } from "./words.js";

const LEVELS = 9;

export class Heatmap {
  #profile;
  #pages;
  #step = null;
  #length = 0;
  #selected = null;

  /** `onSelect(position)`: a mark was pointed at, focused or pressed. */
  constructor(id, profile, onSelect) {
    this.#profile = profile;
    this.strip = el("div", { class: "strip" });
    this.box = el("div", { class: "heat-box", tabindex: "0", role: "region",
      "aria-label": "Text of the document with the sampled positions" });
    const path = `/v1/adaptations/${encodeURIComponent(id)}/study/tokens`;
    const load = (first, limit, signal) => getJson(`${path}?after=${first}&limit=${limit}`, signal);
    this.#pages = new TextPages(this.box, profile.num_tokens, load, (page) => this.#filled(page));
    this.text = this.#pages.element;
    this.box.append(this.text, el("p", { class: "note heat-end" }, "End of the document"));
    this.readout = el("p", { class: "note readout" }, "Point at a word to see how unsure the model was of it.");
    const select = (event) => {
      const mark = event.target.closest(".mark");
      if (mark) onSelect(Number(mark.dataset.position));
    };
    for (const kind of ["mouseover", "focusin", "click"]) this.text.addEventListener(kind, select);
    this.text.addEventListener("mouseover", (event) => this.#read(event.target));
    this.#drawStrip();
  }

  close() {
    this.#pages.close();
  }

  /** Mark the positions of a step; `length` tokens behind each are what it tried to write. */
  show(step, length) {
    const isFocused = this.text.contains(document.activeElement);
    this.#step = step;
    this.#length = length;
    this.#drawStrip();
    for (const mark of this.text.querySelectorAll(".mark")) mark.remove();
    for (const span of this.text.querySelectorAll(".tried")) span.classList.remove("tried");
    for (const page of this.#pages.filled) this.#mark(page);
    this.#choose();
    if (isFocused && !this.text.contains(document.activeElement)) this.box.focus({ preventScroll: true });
  }

  /** Point out the mark of a position that is already shown. */
  select(position) {
    this.#selected = position;
    this.#choose();
  }

  /** Bring a position into view, loading the text around it where that is needed. */
  async reveal(position) {
    await this.#pages.show(position);
    this.select(position);
  }

  #filled(page) {
    for (const span of page.spans) span.className = `t h${this.#level(span.entropy)}`;
    this.#mark(page);
    this.#choose();
  }

  /** Mark what of the step lies on this page. */
  #mark({ first, spans }) {
    const { positions } = this.#step ?? { positions: [] };
    positions.forEach(({ position }, index) => {
      spans[position - first]?.before(el("button", { type: "button", class: "mark", "data-position": position,
        "aria-label": `Position ${index + 1} of ${positions.length}: show its rollouts` }));
      for (let i = position; i < position + this.#length; i += 1) spans[i - first]?.classList.add("tried");
    });
  }

  #choose() {
    const position = this.#selected;
    for (const span of this.text.querySelectorAll(".chosen")) span.classList.remove("chosen");
    for (const mark of this.text.querySelectorAll(".mark")) {
      mark.classList.toggle("on", Number(mark.dataset.position) === position);
    }
    for (const tick of this.strip.querySelectorAll(".tick")) {
      tick.classList.toggle("on", tick.dataset.position === String(position));
    }
    if (position === null) return;
    for (let i = position; i < position + this.#length; i += 1) this.#pages.span(i)?.classList.add("chosen");
  }

  #level(entropy) {
    if (entropy === null) return 0;
    const { low, high } = this.#profile;
    const share = high > low ? (entropy - low) / (high - low) : 0;
    return Math.min(LEVELS, Math.max(0, Math.floor(share * (LEVELS + 1))));
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
        this.#pages.show(Math.min(place, total - 1));
      } }, bars, ticks);
    this.strip.replaceChildren(drawing);
  }
}

/** What the colours mean. */
export function legend(profile) {
  const cells = Array.from({ length: LEVELS + 1 }, (_, i) => el("span", { class: `t h${i}` }, "\u00a0"));
  return el("p", { class: "legend", "aria-hidden": "true" }, `sure (${number(profile.low, 1)} nats)`,
    el("span", { class: "scale" }, cells), `unsure (${number(profile.high, 1)} nats)`);
}
