/* The list at the side: documents with their studies, newest first. */

import { ApiError, getJson } from "./api.js";
import { byId, el, visible } from "./dom.js";
import { age, bytes, count, isActive, STATES, stateOf } from "./words.js";

const PAGE = 50;

export class DocumentList {
  #entries = [];
  #limit = PAGE;
  #current = "";

  constructor() {
    byId("list-more").addEventListener("click", () => {
      this.#limit += PAGE;
      this.refresh();
    });
  }

  /** Documents, each with its adaptations (newest first) and the one to open. */
  get entries() {
    return this.#entries;
  }

  get anyActive() {
    return this.#entries.some((entry) => entry.adaptations.some(isActive));
  }

  /** The entry that an adaptation or a document id belongs to. */
  entryOf(id) {
    return this.#entries.find((entry) => entry.document?.id === id ||
      entry.adaptations.some((adaptation) => adaptation.id === id));
  }

  select(id) {
    this.#current = id;
    this.#show(false);
  }

  async refresh() {
    try {
      const [documents, adaptations] = await Promise.all([
        newest("/v1/documents", this.#limit), newest("/v1/adaptations", 2 * this.#limit),
      ]);
      this.#entries = grouped(documents.data, adaptations.data);
      this.#show(documents.more);
      byId("list-note").textContent = this.#entries.length ? "" : "None yet.";
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      byId("list-note").textContent = error.message;
    }
  }

  #show(more) {
    const focused = document.activeElement?.closest?.("#list a")?.getAttribute("href");
    byId("list").replaceChildren(...this.#entries.map((entry) => this.#item(entry)));
    byId("list-more").hidden = !more;
    if (focused) byId("list").querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  }

  #item(entry) {
    const state = stateOf(entry.shown);
    const isCurrent = entry === this.entryOf(this.#current);
    return el("li", {},
      el("a", { href: `#/${entry.shown?.id ?? entry.document.id}`, "aria-current": isCurrent && "page" },
        el("bdi", { class: "name" }, visible(entry.title)),
        el("span", { class: "meta" }, el("span", { class: `badge ${state}` }, STATES[state]), ` ${age(entry.createdAt)}`),
        el("span", { class: "meta" }, `${count(entry.tokens, "token")} · ${bytes(entry.bytes)}`)));
  }
}

async function newest(path, wanted) {
  const data = [];
  let more = true;
  while (more && data.length < wanted) {
    const after = data.length ? `&after=${encodeURIComponent(data.at(-1).id)}` : "";
    const page = await getJson(`${path}?limit=${Math.min(100, wanted - data.length)}${after}`);
    data.push(...page.data);
    more = page.has_more;
  }
  return { data, more };
}

/** Adaptations under their documents; those that came with a text of their own stand alone. */
function grouped(documents, adaptations) {
  const entries = new Map();
  const keys = new Map();
  for (const item of documents) {
    keys.set(item.id, item.sha256);
    if (!entries.has(item.sha256)) entries.set(item.sha256, { document: item, adaptations: [] });
  }
  for (const adaptation of adaptations) {
    const key = keys.get(adaptation.document_id) ?? adaptation.sha256;
    if (!entries.has(key)) entries.set(key, { document: null, adaptations: [] });
    entries.get(key).adaptations.push(adaptation);
  }
  const all = [...entries.values()].map(({ document, adaptations: own }) => {
    const shown = own.find((item) => item.method.type !== "read") ?? own[0];
    const size = document ?? shown;
    return {
      document, adaptations: own, shown,
      title: document?.title || shown?.metadata?.title || `Document ${size.sha256.slice(0, 8)}`,
      tokens: size.num_tokens, bytes: size.bytes,
      createdAt: Math.max(document?.created_at ?? 0, shown?.created_at ?? 0),
    };
  });
  return all.sort((a, b) => b.createdAt - a.createdAt);
}
