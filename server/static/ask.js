/* Questions about a studied document: the unchanged model's answer beside the adapted one's. */

import { ApiError, getJson, stream } from "./api.js";
import { announce, el, visible } from "./dom.js";
import { answerVerdict } from "./words.js";

export class Ask {
  #adaptation;
  #signal;

  /** `signal` ends what is under way when the page shows something else. */
  constructor(adaptation, signal) {
    this.#adaptation = adaptation;
    this.#signal = signal;
    this.question = el("input", { id: "question", required: true, maxlength: "4000", autocomplete: "off",
      placeholder: "What does the text say about …?" });
    this.focus = el("input", { type: "checkbox", id: "focus", checked: true });
    this.button = el("button", { type: "submit", class: "primary" }, "Ask");
    this.error = el("p", { class: "banner bad", role: "alert", hidden: true });
    this.answers = el("div", { class: "answers" });
    const form = el("form", { onsubmit: (event) => {
      event.preventDefault();
      this.#submit();
    } },
    el("label", { for: "question" }, "Your question"),
    el("div", { class: "row ask-row" }, this.question, this.button),
    el("p", { class: "check" }, this.focus,
      el("label", { for: "focus" }, "Study the document for this question before answering ",
        el("span", { class: "hint" }, "(focus; some thousand tokens of work)"))),
    this.error);
    this.element = el("section", { class: "card ask", "aria-labelledby": "ask-title" },
      el("h2", { id: "ask-title" }, "Ask"), form, this.answers);
  }

  async #submit() {
    const question = this.question.value.trim();
    if (!question) {
      this.question.focus();
      return;
    }
    this.error.hidden = true;
    this.button.disabled = true;
    const base = new Column("Unchanged model", "read once, nothing learned");
    const adapted = new Column("Adapted", this.focus.checked ? "studied for this question" : "with what was learned");
    this.answers.prepend(el("article", { class: "answer", "aria-label": `Answers to: ${visible(question)}` },
      el("h3", {}, el("bdi", {}, visible(question))),
      el("div", { class: "pair" }, base.element, adapted.element)));
    try {
      const focus = this.focus.checked;
      const about = { questions: [question], max_tokens: 96 };
      const own = { ...about, adaptation: this.#adaptation.id, focus };
      const plain = await this.#base();
      const outcomes = await Promise.allSettled([
        adapted.run(own, this.#adaptation, this.#signal),
        plain ? base.run({ ...about, ...plain, focus: false }, { status: "read" }, this.#signal) : base.none()]);
      const broken = outcomes.find((item) => item.status === "rejected" && !(item.reason instanceof ApiError));
      if (broken) throw broken.reason;
      announce(`Unchanged: ${base.text || "no answer"}. Adapted: ${adapted.text || "no answer"}.`);
      this.question.select();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.error.textContent = error.message;
      this.error.hidden = false;
    } finally {
      this.button.disabled = false;
    }
  }

  /** What to ask for the answer of the unchanged model: a plain reading of the same document. Null
      for an imported adapter, whose document's text nobody has. */
  async #base() {
    const { id, method, status, document_id: document } = this.#adaptation;
    if (method.type === "read" || status === "rejected") return { adaptation: id };
    if (method.type === "import") return null;
    if (document) return { document_id: document, method: { type: "read" } };
    return { document: await wholeText(id), method: { type: "read" } };
  }
}

async function wholeText(id) {
  const parts = [];
  let after = 0;
  for (;;) {
    const page = await getJson(`/v1/adaptations/${encodeURIComponent(id)}/study/tokens?after=${after}&limit=10000`);
    parts.push(...page.texts);
    after += page.texts.length;
    if (!page.has_more) return parts.join("");
  }
}

class Column {
  constructor(title, hint) {
    this.text = "";
    this.output = el("p", { class: "output", dir: "auto" });
    this.status = el("p", { class: "note" }, "Waiting …");
    this.element = el("div", { class: "column" },
      el("h4", {}, title, " ", el("span", { class: "hint" }, hint)), this.output, this.status);
  }

  none() {
    this.#settle({ tone: "plain", text: "There is no text of the document to read." });
  }

  async run(body, adaptation, signal) {
    try {
      for await (const { data } of stream("POST", "/v1/answers", { body: { ...body, stream: true }, signal })) {
        this.#take(data, adaptation);
      }
    } catch (error) {
      if (error instanceof ApiError) this.#settle({ tone: "bad", text: error.message });
      throw error;
    }
  }

  #take(data, adaptation) {
    if (data.object === "answer.progress") {
      const steps = data.steps ? `, step ${data.step} of ${data.steps}` : "";
      this.status.textContent = data.phase === "focus" ? `Studying for the question${steps}` : "Reading …";
    } else if (data.object === "answer.delta") {
      this.text += data.text;
      this.output.textContent = visible(this.text);
      this.status.textContent = "Answering …";
    } else if (data.object === "answer.done") {
      this.text = data.answer;
      this.output.textContent = visible(data.answer) || "(nothing)";
      this.#settle(answerVerdict(data, adaptation));
    }
  }

  #settle({ tone, text }) {
    this.status.textContent = text;
    this.status.className = `note verdict-line ${tone}`;
  }
}
