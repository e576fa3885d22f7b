/* Numbers and outcomes in plain words. Knows the shapes of the interface; touches no page. */

const NUMBER = new Intl.NumberFormat("en");

export const STATES = {
  queued: "Waiting",
  running: "Studying",
  succeeded: "Studied",
  rejected: "Put aside",
  failed: "Failed",
  cancelled: "Cancelled",
  expired: "Expired",
  stored: "Not studied",
  read: "Read",
};

/** The state as the page shows it: a plain reading is no study that helped. */
export function stateOf(adaptation) {
  if (!adaptation) return "stored";
  const read = adaptation.method.type === "read" && adaptation.status === "succeeded";
  return read ? "read" : adaptation.status;
}

export function isActive(adaptation) {
  return adaptation.status === "queued" || adaptation.status === "running";
}

export function isReady(adaptation) {
  return adaptation.status === "succeeded" || adaptation.status === "rejected";
}

export function whole(number) {
  return NUMBER.format(number);
}

export function count(number, one, many = `${one}s`) {
  return `${NUMBER.format(number)} ${number === 1 ? one : many}`;
}

export function bytes(number) {
  const units = ["B", "kB", "MB", "GB"];
  let value = number;
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

export function seconds(value) {
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return `${(value / 3600).toFixed(1)} h`;
}

export function age(moment, now = Date.now() / 1000) {
  const passed = Math.max(0, now - moment);
  if (passed < 45) return "just now";
  if (passed < 3600) return `${Math.max(1, Math.round(passed / 60))} min ago`;
  if (passed < 86400) return `${Math.round(passed / 3600)} h ago`;
  return `${count(Math.round(passed / 86400), "day")} ago`;
}

export function number(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && Math.abs(value) < 10 ** -digits) return value.toExponential(1);
  return value.toFixed(digits);
}

const PHASES = {
  read: "reading the document",
  select: "choosing positions",
  rollout: "writing rollouts",
  forward: "reading again",
  backward: "learning from the rewards",
  adapt: "taking a step",
  step: "taking a step",
  probe: "testing recall",
  gate: "judging whether it helped",
  resume: "going on after an interruption",
  finished: "storing what was learned",
};

/** What is going on right now, for a progress line. */
export function phase(progress) {
  const what = PHASES[progress?.phase] ?? "waiting for its turn";
  if (!progress?.steps) return what;
  return `${what}, step ${Math.min(progress.step ?? 0, progress.steps)} of ${progress.steps}`;
}

/** By how much a token became likelier, from a gain in nats. */
function likelier(gain) {
  const factor = Math.exp(Math.abs(gain));
  const much = factor >= 2 ? `${factor.toFixed(1)} times` : `${((factor - 1) * 100).toFixed(1)} %`;
  return `${much} ${gain >= 0 ? "likelier" : "less likely"}`;
}

/** The gate's verdict: {tone, title, text}. Null while there is none. */
export function verdict(adaptation) {
  const { status, result, error } = adaptation;
  if (status === "failed") {
    return { tone: "bad", title: "The study failed", text: `${error?.message ?? "It ended"}.` };
  }
  if (status === "cancelled") {
    return { tone: "plain", title: "Cancelled", text: "The study was stopped before its end." };
  }
  if (status === "expired") {
    const text = "What was learned has been freed. Study the document again to ask about it.";
    return { tone: "plain", title: "Expired", text };
  }
  if (!isReady(adaptation)) return null;
  if (adaptation.method.type === "import") {
    const text = "The adapter came as a file. The text of its document did not, so there is no " +
      "answer of the unchanged model to compare with.";
    return { tone: "plain", title: "Imported", text };
  }
  if (adaptation.method.type === "read") {
    const text = "The document was read once and nothing was practised. Answers can still be " +
      "studied for, question by question.";
    return { tone: "plain", title: "Read, not studied", text };
  }
  return status === "succeeded"
    ? accepted(result ?? {}, adaptation.method)
    : refused(result ?? {}, adaptation.method);
}

function accepted(result, method) {
  return {
    tone: "good",
    title: "Studying helped",
    text: `${judgedAt(method)}, the right next token became ` +
      `${likelier(result.probe_gain_nats ?? 0)} (${change(result)}).${heldOut(result)}${side(result)} ` +
      strength(result.alpha ?? 1, method),
  };
}

/** How much of what was learned is used: a part of it keeps more of what was known before. */
function strength(alpha, { blend_factors: [first] = [1] }) {
  const percent = (share) => `${Math.round(share * 100)} %`;
  const passed = alpha < first ? `With ${percent(first)} of what was learned it did not pass; with less it did. ` : "";
  return alpha < 1
    ? `${passed}Answers use ${percent(alpha)} of what was learned, which harms less of what the memory had.`
    : "Answers use what was learned.";
}

/** Which places the gate asked for. */
function judgedAt({ selection }) {
  return selection === "write"
    ? "At the places that its memory wrote most strongly, asked for with a shorter cue than in practice"
    : "At places that took no part in the study";
}

/** What the first steps did to places that they left out. */
function heldOut({ held_out_gain_nats: gain }) {
  return gain === null || gain === undefined
    ? ""
    : ` The first steps left half of these places out; there it became ${likelier(gain)} without practice.`;
}

/** Where the positions of a step come from. */
export function positions({ selection }) {
  const where = {
    write: "drawn where the memory wrote most strongly, not where the model was unsure",
    entropy: "drawn where the model was unsure",
    argmax: "where the model was most unsure",
    argmin: "where the model was surest",
    uniform: "drawn anywhere",
  };
  return `The marks are the positions that a step practised at: ${where[selection] ?? selection}.`;
}

function refused(result, method) {
  const tested = result.probe_gain_nats
    ? `${judgedAt(method)}, the right next token became ` +
      `${likelier(result.probe_gain_nats)} (${change(result)}).${side(result)} `
    : `${heldOut(result)} `.trimStart();
  return {
    tone: "warn",
    title: "The gate put the study aside",
    text: `${tested}Its reason: ${result.reason ?? "none was given"}. Answers come from the ` +
      "unchanged model and its reading of the document; it can still study for a question.",
  };
}

function change(result) {
  const noise = result.probe_gain_error_nats;
  const error = noise ? ` \u00b1 ${number(noise, 3)}` : "";
  return `gain ${number(result.probe_gain_nats, 3)}${error} nats, from ${number(result.probe_before)}`;
}

function side(result) {
  const rise = result.neutral_rise_nats;
  if (rise === null || rise === undefined) return "";
  const words = Math.abs(rise) < 0.01
    ? "Ordinary text is as easy for it as before."
    : `Ordinary text became ${rise > 0 ? "harder" : "easier"} by ${number(Math.abs(rise), 3)} nats.`;
  return ` ${words}`;
}

/** What stood behind one answer: {tone, text}. */
export function answerVerdict(answer, adaptation) {
  const { focus, adapted } = answer;
  if (focus) {
    const probe = focus.probe_before === null || focus.probe_before === undefined
      ? ""
      : ` Recall near the question\u2019s words: ${number(focus.probe_before)} \u2192 ` +
        `${number(focus.probe_after)} nats (lower is surer).`;
    const steps = count(focus.steps, "step");
    const again = focus.passage_tokens
      ? ` Passages near its words (${count(focus.passage_tokens, "token")}) were read again before it.`
      : "";
    const better = {
      document: "but a draft of the answer without that was better: this is the answer without it.",
      passages: "but a draft of the answer from passages near its words alone was better: this is " +
        "the answer from these.",
      base: "but a draft of the answer without any study was better: this is the unchanged model's.",
    };
    if (better[focus.way] && (focus.drafts?.focus || focus.way === "base")) {
      return {
        tone: "plain",
        text: `Studied for this question in ${steps}, ${better[focus.way]}${probe}`,
      };
    }
    // `adapted` may speak of the document's own study: what the gate kept of this one has an alpha
    return typeof focus.alpha === "number"
      ? {
          tone: "good",
          text: `Studied for this question in ${steps}, and the gate kept it.${probe}${again}`,
        }
      : {
          tone: "warn",
          text: `Studied for this question in ${steps}, but the gate refused (${focus.reason}): ` +
            `this is the answer without it.${probe}${again}`,
        };
  }
  if (adapted) return { tone: "good", text: "Uses what the study of the document left." };
  return adaptation.status === "rejected"
    ? { tone: "warn", text: "The gate had put the study aside, so this is the unchanged model." }
    : { tone: "plain", text: "The unchanged model, after one reading of the document." };
}
