/* The form that takes a document: pasted, dropped or chosen. Ends in an adaptation. */

import { ApiError, postJson, request } from "./api.js";
import { announce, byId } from "./dom.js";
import { bytes, count } from "./words.js";

const SHOWN_CHARS = 200_000; // a longer file is kept aside: a text field would be slow with it
const READABLE = /\.(txt|text|md|markdown|rst|csv|tsv|json|log|tex)$/i;

/** `onStarted(adaptation)` is called when the server has accepted the document. */
export class Compose {
  #attached = null; // {file} or {text, name}
  #onStarted;

  constructor(onStarted) {
    this.#onStarted = onStarted;
    byId("compose-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    byId("text").addEventListener("input", () => this.#note());
    byId("file-button").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", (event) => this.#take(event.target.files[0]));
    byId("attached-remove").addEventListener("click", () => this.#attach(null));
    byId("example-button").addEventListener("click", () => this.#example());
    this.#listenForDrops();
  }

  #listenForDrops() {
    const drop = byId("drop");
    drop.addEventListener("dragover", (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      drop.classList.remove("over");
      const [file] = event.dataTransfer.files;
      if (!file) return; // dropped text goes into the field, as browsers do it
      event.preventDefault();
      this.#take(file);
    });
  }

  async #take(file) {
    byId("file").value = "";
    if (!file) return;
    this.#fail("");
    if (!byId("title").value) byId("title").value = file.name.slice(0, 200);
    if (!file.type.startsWith("text/plain") && !READABLE.test(file.name)) {
      this.#attach({ file, name: file.name });
      return;
    }
    const text = await file.text();
    if (text.length > SHOWN_CHARS) this.#attach({ text, name: file.name });
    else {
      this.#attach(null);
      byId("text").value = text;
      this.#note();
    }
  }

  #attach(attached) {
    this.#attached = attached;
    byId("attached").hidden = attached === null;
    byId("text").hidden = attached !== null;
    byId("attached-name").textContent = attached?.name ?? "";
    this.#note();
    if (attached) byId("attached-remove").focus();
  }

  async #example() {
    this.#attach(null);
    byId("text").value = await (await request("GET", "/static/example.txt")).text();
    byId("title").value = "The harbour (example)";
    this.#note();
    announce("The example is in the text field.");
  }

  #note() {
    const length = this.#attached?.text?.length ?? byId("text").value.length;
    let note = length ? count(length, "character") : "Nothing yet";
    if (this.#attached?.file) note = bytes(this.#attached.file.size);
    byId("text-note").textContent = note;
  }

  #fail(message) {
    byId("compose-error").textContent = message;
    byId("compose-error").hidden = !message;
  }

  async #submit() {
    const text = this.#attached ? this.#attached.text : byId("text").value;
    if (!this.#attached && !text.trim()) {
      this.#fail("There is no text yet: paste one, or choose a file.");
      byId("text").focus();
      return;
    }
    this.#fail("");
    const button = byId("compose-submit");
    button.disabled = true;
    button.textContent = "Sending …";
    try {
      const document = await this.#send(text);
      const adaptation = await postJson("/v1/adaptations", {
        document_id: document.id,
        method: this.#method(),
        seed: Number(byId("seed").value) || 0,
      });
      byId("compose-form").reset();
      this.#attach(null);
      this.#onStarted(adaptation);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.#fail(error.message);
    } finally {
      button.disabled = false;
      button.textContent = "Study it";
    }
  }

  async #send(text) {
    const title = byId("title").value.trim();
    if (this.#attached?.file) {
      const body = new FormData();
      if (title) body.append("title", title);
      body.append("file", this.#attached.file);
      return (await request("POST", "/v1/documents", { body })).json();
    }
    return postJson("/v1/documents", { text, title: title || firstWords(text) });
  }

  #method() {
    const method = { type: "refine" };
    if (byId("preset").value) method.preset = byId("preset").value;
    if (byId("steps").value) method.steps = Number(byId("steps").value);
    return method;
  }
}

function firstWords(text) {
  const words = text.slice(0, 400).trim().split(/\s+/).join(" ");
  return words.length > 60 ? `${words.slice(0, 57)}…` : words;
}
