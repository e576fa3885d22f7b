/* One adaptation: followed live while it runs, looked back at when it has ended. */

import { ApiError, follow, getJson, postJson, request } from "./api.js";
import { Ask } from "./ask.js";
import { Branches } from "./branches.js";
import { Curves } from "./curves.js";
import { announce, el, visible } from "./dom.js";
import { Heatmap, legend } from "./heatmap.js";
import { confirmed, download } from "./actions.js";
import * as words from "./words.js";

const NOT_KEPT = "How the text was studied is kept only as long as what was learned from it.";

export class Study {
  #id;
  #entry;
  #onChange;
  #stop = new AbortController();
  #steps = []; // what each step tried, as far as it is known
  #chosen = null; // a step that was picked by hand; null follows the newest
  #fetching = null;
  #heatmap = null;
  #branches = null;
  #progress = {};

  /** Shows an adaptation in `root`; `entry` is its place in the list, if it has one yet.

  `onChange(gone)` is called when the list has to be read again; `gone` after a deletion. */
  constructor(root, id, entry, onChange) {
    this.#id = id;
    this.#entry = entry;
    this.#onChange = onChange;
    this.title = el("h1", { id: "study-title", tabindex: "-1" }, "Study");
    this.head = el("div", { class: "study-head" });
    this.banner = el("p", { class: "banner bad", role: "alert", hidden: true });
    this.bar = el("progress", { max: 1, "aria-label": "Progress of the study" });
    this.phase = el("p", { class: "note" });
    this.running = el("div", { class: "card under-way", hidden: true }, this.phase, this.bar);
    this.verdict = el("div", {});
    this.ask = el("div", {});
    this.curves = new Curves();
    this.curvesPart = el("section", { "aria-labelledby": "curves-title", hidden: true },
      el("h2", { id: "curves-title" }, "Step by step"), this.curves.element);
    this.textPart = el("section", { "aria-labelledby": "text-title" },
      el("h2", { id: "text-title" }, "The text, as the model met it"));
    this.textBody = el("p", { class: "note" }, "The document has not been read yet.");
    this.textPart.append(this.textBody);
    root.replaceChildren(this.title, this.head, this.banner, this.running, this.verdict, this.ask,
      this.curvesPart, this.textPart);
    this.#run();
  }

  close() {
    this.#stop.abort();
    this.#heatmap?.close();
  }

  async #run() {
    try {
      await this.#refresh();
      const lost = () => {
        this.phase.textContent = "The connection is lost; trying again …";
      };
      for await (const event of follow(this.#id, this.#stop.signal, lost)) await this.#take(event);
      await this.#refresh();
      // no event told of its reading: it was made by an earlier version, or imported
      if (words.isReady(this.adaptation)) await this.#drawText();
      await this.#fetchSteps();
      this.#onChange(false);
    } catch (error) {
      if (error.name !== "AbortError") this.#fail(error);
    }
  }

  #fail(error) {
    if (!(error instanceof ApiError)) throw error;
    this.banner.textContent = error.message;
    this.banner.hidden = false;
    this.running.hidden = true;
    if (!this.adaptation) this.textPart.hidden = true;
    if (error.code === "adaptation_not_found") this.banner.textContent = "There is no such study. It may have been deleted.";
  }

  async #refresh() {
    const before = this.adaptation?.status;
    this.adaptation = await getJson(`/v1/adaptations/${encodeURIComponent(this.#id)}`, this.#stop.signal);
    const { adaptation } = this;
    const name = this.#entry?.title ?? adaptation.metadata?.title ?? "Study";
    this.title.replaceChildren(el("bdi", {}, visible(name)));
    document.title = `${visible(name)} · Imprint`;
    this.#drawHead();
    this.running.hidden = !words.isActive(adaptation);
    if (words.isActive(adaptation)) this.#drawProgress(adaptation.progress);
    const verdict = words.verdict(adaptation);
    this.verdict.replaceChildren(...(verdict ? [el("section", { class: `card verdict ${verdict.tone}`,
      "aria-label": "The gate’s verdict" }, el("h2", {}, verdict.title), el("p", {}, verdict.text))] : []));
    if (verdict && before && words.STATES[before] !== words.STATES[adaptation.status]) {
      announce(`${verdict.title}. ${verdict.text}`);
    }
    if (words.isReady(adaptation) && !this.ask.hasChildNodes()) {
      this.ask.append(new Ask(adaptation, this.#stop.signal).element);
    }
    if (!words.isActive(adaptation) && !words.isReady(adaptation) && !this.#heatmap) {
      this.textBody.textContent = NOT_KEPT;
    }
  }

  #drawHead() {
    const { adaptation } = this;
    const state = words.stateOf(adaptation);
    const facts = [
      words.count(adaptation.num_tokens, "token"), words.bytes(adaptation.bytes),
      words.age(adaptation.created_at)];
    if (adaptation.finished_at) facts.push(`took ${words.seconds(adaptation.seconds ?? 0)}`);
    if (adaptation.adapter_bytes) facts.push(`memory ${words.bytes(adaptation.adapter_bytes)}`);
    const others = (this.#entry?.adaptations ?? []).filter((item) => item.id !== this.#id);
    this.head.replaceChildren(
      el("p", { class: "facts" }, el("span", { class: `badge ${state}` }, words.STATES[state]), " ", facts.join(" · ")),
      el("div", { class: "actions" },
        words.isActive(adaptation)
          ? el("button", { type: "button", class: "quiet", onclick: () => this.#act(() => this.#cancel()) }, "Cancel")
          : words.isReady(adaptation)
            ? el("button", { type: "button", class: "quiet", onclick: () => this.#act(() => this.#export()) }, "Export adapter")
            : adaptation.document_id && el("button", { type: "button", class: "quiet",
              onclick: () => this.#act(() => this.#again()) }, "Study it again"),
        el("button", { type: "button", class: "danger quiet", onclick: () => this.#act(() => this.#delete()) }, "Delete")),
      others.length ? el("p", { class: "note others" }, "Other work on this document: ",
        others.flatMap((item, i) => [i ? ", " : "", el("a", { href: `#/${item.id}` },
          `${words.STATES[words.stateOf(item)].toLowerCase()} ${words.age(item.created_at)}`)])) : "");
  }

  #drawProgress(progress) {
    this.#progress = { ...this.#progress, ...progress };
    const { step, steps } = this.#progress;
    if (steps) this.bar.value = Math.min(1, (step ?? 0) / steps);
    else this.bar.removeAttribute("value");
    const finish = this.adaptation?.estimated_finish;
    const left = finish ? finish - Date.now() / 1000 : 0;
    const text = words.phase(this.#progress);
    this.phase.textContent = `${text[0].toUpperCase()}${text.slice(1)}` +
      (left > 1 ? `, about ${words.seconds(left)} left` : "");
  }

  async #take(event) {
    const { kind, data } = event;
    if (kind === "progress") this.#drawProgress(data);
    else if (kind === "read") await this.#drawText();
    else if (kind === "step") {
      this.curvesPart.hidden = false;
      this.curves.add(data);
      this.#drawProgress({ phase: "step", step: data.step, steps: data.steps });
      this.#fetchSteps().catch((error) => error.name === "AbortError" || this.#fail(error));
    } else if (kind === "running" || kind === "requeued") await this.#refresh();
  }

  async #drawText() {
    if (this.#heatmap || words.stateOf(this.adaptation) === "expired") return;
    if (this.adaptation.method.type === "import") {
      this.textBody.textContent = NOT_KEPT;
      return;
    }
    let profile;
    try {
      profile = await getJson(`/v1/adaptations/${encodeURIComponent(this.#id)}/study/profile`, this.#stop.signal);
    } catch (error) {
      if (!(error instanceof ApiError) || error.code !== "study_gone") throw error;
      this.textBody.textContent = NOT_KEPT;
      return;
    }
    this.#branches = new Branches((position) => this.#heatmap.reveal(position));
    this.#heatmap = new Heatmap(this.#id, profile, (position) => {
      this.#branches.select(position);
      this.#heatmap.select(position);
    });
    this.#branches.element.hidden = true;
    this.stepInput = el("input", { type: "range", min: 1, max: 1, value: 1, id: "step",
      oninput: () => this.#choose(Number(this.stepInput.value)) });
    this.stepLabel = el("output", { for: "step" }, "1");
    this.stepRow = el("div", { class: "row step-row", hidden: true }, el("label", { for: "step" }, "Step"),
      this.stepInput, this.stepLabel);
    this.textBody.remove();
    this.textPart.append(
      el("p", { class: "note" }, `On average ${words.number(profile.entropy_mean)} nats of uncertainty a token.`,
        this.adaptation.method.type !== "read" && ` ${words.positions(this.adaptation.method)}`),
      legend(profile), this.#heatmap.strip, this.stepRow,
      el("div", { class: "text-pair" }, el("div", {}, this.#heatmap.box, this.#heatmap.readout),
        this.#branches.element),
      this.#branches.list);
    this.#branches.list.hidden = true;
  }

  /** Fetch what the steps that are not known yet tried; calls while it runs wait for one more. */
  #fetchSteps() {
    const before = this.#fetching ?? Promise.resolve();
    const mine = before.then(() => this.#fetchNew()).finally(() => {
      if (this.#fetching === mine) this.#fetching = null;
    });
    this.#fetching = mine;
    return mine;
  }

  async #fetchNew() {
    if (!this.#heatmap) return;
    let more = true;
    while (more) {
      const after = this.#steps.at(-1)?.step ?? 0;
      const path = `/v1/adaptations/${encodeURIComponent(this.#id)}/study?after=${after}&limit=16`;
      let page;
      try {
        page = await getJson(path, this.#stop.signal);
      } catch (error) {
        if (error instanceof ApiError && error.code === "study_gone") return;
        throw error;
      }
      this.#steps.push(...page.data);
      more = page.has_more;
    }
    if (!this.#steps.length) return;
    this.stepInput.max = String(this.#steps.length);
    this.stepRow.hidden = this.#steps.length < 2;
    if (this.#chosen === null) this.#show(this.#steps.length);
    else this.stepLabel.textContent = `${this.#chosen} of ${this.#steps.length}`;
  }

  #choose(index) {
    this.#chosen = index === this.#steps.length && words.isActive(this.adaptation) ? null : index;
    this.#show(index);
  }

  #show(index) {
    const step = this.#steps[index - 1];
    this.stepInput.value = String(index);
    this.stepLabel.textContent = `${step.step} of ${this.#steps.at(-1).step}`;
    this.#branches.element.hidden = this.#branches.list.hidden = false;
    this.#branches.show(step);
    this.#heatmap.show(step, this.adaptation.method.rollout_length ?? 0);
    this.#heatmap.select(this.#branches.position);
  }

  async #act(action) {
    this.banner.hidden = true;
    try {
      await action();
    } catch (error) {
      if (error.name !== "AbortError") this.#fail(error);
    }
  }

  async #cancel() {
    await postJson(`/v1/adaptations/${encodeURIComponent(this.#id)}/cancel`, {});
    await this.#refresh();
    this.#onChange(false);
  }

  async #again() {
    const { document_id, method, seed } = this.adaptation;
    const adaptation = await postJson("/v1/adaptations", { document_id, method, seed });
    this.#onChange(false);
    location.hash = `#/${adaptation.id}`;
  }

  async #export() {
    const response = await request("GET", `/v1/adaptations/${encodeURIComponent(this.#id)}/adapter`);
    download(await response.blob(), `${this.#id}.safetensors`);
    announce("The adapter is being saved.");
  }

  async #delete() {
    const title = this.title.textContent;
    const text = "The document and everything that was learned from it will be gone, from memory and from disk.";
    if (!(await confirmed(`Delete “${title}”?`, text))) return;
    const document = this.adaptation.document_id ?? this.#entry?.document?.id;
    const path = document ? `/v1/documents/${encodeURIComponent(document)}`
      : `/v1/adaptations/${encodeURIComponent(this.#id)}`;
    this.close();
    await request("DELETE", path);
    announce("Deleted.");
    this.#onChange(true);
  }
}
