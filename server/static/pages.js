/* A long text as pages of tokens, of which only those near the viewport are in the document.

A page has its place from the beginning; one that is far away keeps its height and a line that says
what stands there, so scroll bar, keyboard and screen reader reach it, and it is filled on the way.
Knows tokens and their spans; knows nothing of what is marked on them. */

import { ApiError } from "./api.js";
import { el, visible } from "./dom.js";
import { whole } from "./words.js";

const PAGE = 1000;
const OVERLAP = 64; // tokens in which the place is looked for where one page ends and the next begins
const NEAR = "200%"; // of the box's height, above and below: what is further away is emptied
const KEPT = 48; // pages whose tokens are remembered, so that coming back asks nothing of the server
const ANCHORED = CSS.supports("overflow-anchor", "auto"); // else a text that grows above moves what is read

export class TextPages {
  #box;
  #load;
  #onFilled;
  #pages;
  #known = new Map(); // tokens by page, the page that was asked last at the end
  #filled = new Set();
  #held = new Set(); // filled pages that are far away, but focused, selected, or about to be shown
  #observer;
  #resizer;
  #turn = 0;
  #width = 0;

  /** `total` tokens in the scrolling `box`. `load(first, limit, signal)` gives {texts, entropies};
      `onFilled(page)` is called with {first, spans} when a page has come into the document. */
  constructor(box, total, load, onFilled) {
    this.#box = box;
    this.#load = load;
    this.#onFilled = onFilled;
    this.#pages = Array.from({ length: Math.max(1, Math.ceil(total / PAGE)) }, (_, index) => {
      const from = index * PAGE + 1;
      const name = `Tokens ${whole(from)} to ${whole(Math.min(total, from + PAGE - 1))}`;
      const element = el("div", { class: "heat-page", role: "group", dir: "auto", "aria-label": name,
        "data-from": `token ${whole(from)}` });
      element.style.setProperty("--tokens", String(Math.min(PAGE, total - from + 1)));
      const page = { index, name, element, first: index * PAGE, spans: null, near: false, coming: null };
      this.#empty(page);
      return page;
    });
    this.element = el("div", { class: "heat-text" }, this.#pages.map(({ element }) => element));
    const places = new Map(this.#pages.map((page) => [page.element, page]));
    this.#observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) this.#moved(places.get(target), isIntersecting);
      for (const page of [...this.#held]) this.#leave(page); // what stays is added again
    }, { root: box, rootMargin: `${NEAR} 0px` });
    for (const { element } of this.#pages) this.#observer.observe(element);
    this.#resizer = new ResizeObserver(() => this.#resized());
    this.#resizer.observe(this.element);
  }

  close() {
    this.#turn += 1;
    this.#observer.disconnect();
    this.#resizer.disconnect();
    for (const { coming } of this.#pages) coming?.stop.abort();
  }

  /** The pages that are in the document, as {first, spans}. */
  get filled() {
    return this.#filled;
  }

  /** The span of a token, where its page is in the document. */
  span(token) {
    for (const { first, spans } of this.#filled) {
      if (first <= token && token < first + spans.length) return spans[token - first];
    }
    return undefined;
  }

  /** Bring a token into view; a later call has the last word over one that is on its way. */
  async show(token) {
    const turn = (this.#turn += 1);
    const index = Math.min(this.#pages.length - 1, Math.floor(token / PAGE));
    await this.#bring(this.#pages[index]);
    if (index > 0 && token < this.#pages[index].first) await this.#bring(this.#pages[index - 1]);
    if (turn !== this.#turn) return;
    const shown = this.span(token) ?? this.#pages[index].element; // else the reason why it is not there
    const top = shown.getBoundingClientRect().top - this.#box.getBoundingClientRect().top;
    this.#box.scrollTop += top - this.#box.clientHeight / 3;
  }

  #moved(page, near) {
    page.near = near;
    if (near) this.#bring(page);
    else this.#leave(page);
  }

  async #bring(page) {
    try {
      await this.#fill(page);
    } catch (error) {
      if (error.name === "AbortError") return; // it was left, or the view was closed
      if (!(error instanceof ApiError)) throw error;
      const again = el("button", { type: "button", class: "quiet small", onclick: () => this.#bring(page) }, "Try again");
      page.element.replaceChildren(el("p", { class: "note heat-wait", role: "alert" }, error.message, " ", again));
    }
  }

  #leave(page) {
    this.#held.delete(page);
    if (page.near) return;
    page.coming?.stop.abort();
    if (!page.spans) return;
    if (page.element.contains(document.activeElement) || getSelection().containsNode(page.element, true)) {
      this.#held.add(page);
    } else {
      page.element.style.height = `${page.element.getBoundingClientRect().height}px`;
      page.spans = null;
      this.#filled.delete(page);
      this.#empty(page);
    }
  }

  #empty(page) {
    page.element.classList.add("away");
    page.element.replaceChildren(el("p", { class: "note heat-wait" }, page.name));
  }

  async #fill(page) {
    if (page.spans) return;
    const tokens = this.#known.get(page.index) ?? await this.#fetch(page);
    if (page.spans) return; // somebody else waited for it, too
    this.#remember(page.index, tokens);
    const before = page.element.getBoundingClientRect();
    page.first = tokens.first;
    page.spans = tokens.texts.map((text, i) => {
      const span = el("span", {}, visible(text));
      span.entropy = tokens.entropies[i];
      return span;
    });
    page.element.replaceChildren(...page.spans);
    page.element.classList.remove("away");
    page.element.style.height = "";
    this.#filled.add(page);
    this.#onFilled(page);
    this.#measure();
    if (!ANCHORED && before.bottom <= this.#box.getBoundingClientRect().top) {
      this.#box.scrollTop += page.element.getBoundingClientRect().height - before.height;
    }
    if (!page.near) this.#held.add(page);
  }

  /** The tokens of a page, its ends moved to where no line, or at least no word, is cut. */
  #fetch(page) {
    const start = async (stop) => {
      const first = page.index * PAGE;
      const { texts, entropies } = await this.#load(first, PAGE + OVERLAP, stop.signal);
      const from = page.index ? cut(texts.slice(0, OVERLAP)) : 0;
      const to = PAGE + (texts.length > PAGE ? cut(texts.slice(PAGE)) : 0);
      return { first: first + from, texts: texts.slice(from, to), entropies: entropies.slice(from, to) };
    };
    if (!page.coming) {
      const stop = new AbortController();
      const coming = { stop, tokens: start(stop) };
      page.coming = coming;
      const over = () => {
        if (page.coming === coming) page.coming = null;
      };
      coming.tokens.then(over, over);
      stop.signal.addEventListener("abort", over);
    }
    return page.coming.tokens;
  }

  #remember(index, tokens) {
    this.#known.delete(index);
    this.#known.set(index, tokens);
    if (this.#known.size > KEPT) this.#known.delete(this.#known.keys().next().value);
  }

  /** How high an empty page is that never was filled: as its tokens are in those that are. */
  #measure() {
    if (!this.#filled.size || this.element.style.getPropertyValue("--token-height")) return;
    const filled = [...this.#filled];
    const height = filled.reduce((sum, { element }) => sum + element.getBoundingClientRect().height, 0);
    const tokens = filled.reduce((sum, { spans }) => sum + spans.length, 0);
    this.element.style.setProperty("--token-height", `${height / tokens}px`);
  }

  /** Another width is another height for everything: what was measured does not hold any more. */
  #resized() {
    const { width } = this.element.getBoundingClientRect();
    if (width === this.#width) return;
    this.#width = width;
    for (const { element, spans } of this.#pages) if (!spans) element.style.height = "";
    this.element.style.removeProperty("--token-height");
    this.#measure();
  }
}

/** How many of these tokens still belong to the page before. */
function cut(texts) {
  const line = texts.findIndex((text) => /\n$/.test(text));
  if (line >= 0 && line + 1 < texts.length) return line + 1;
  return Math.max(0, texts.findIndex((text) => /^\s/.test(text)));
}
