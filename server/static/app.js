/* What is shown where: the address behind "#/", the list, the server's state, the key. */

import { ApiError, apiKey, getJson, hooks, postJson, setApiKey } from "./api.js";
import { Compose } from "./compose.js";
import { byId, el, visible } from "./dom.js";
import { DocumentList } from "./list.js";
import { Study } from "./study.js";
import { isActive } from "./words.js";

const LIST_INTERVAL_MS = 4000;
const HEALTH_INTERVAL_MS = 8000;

const list = new DocumentList();
let study = null;

new Compose(async (adaptation) => {
  await list.refresh();
  location.hash = `#/${adaptation.id}`;
});

async function route() {
  const { hash } = location;
  if (hash && !hash.startsWith("#/")) return; // a place on this page
  study?.close();
  study = null;
  const id = decodeURIComponent(hash.slice(2));
  byId("compose").hidden = Boolean(id);
  byId("study").hidden = !id;
  list.select(id);
  if (!id) {
    document.title = "Imprint";
    return;
  }
  if (id.startsWith("doc_")) showStored(id);
  else {
    study = new Study(byId("study"), id, list.entryOf(id), (gone) => {
      list.refresh();
      if (gone) leave();
    });
    study.title.focus({ preventScroll: true });
  }
  scrollTo(0, 0);
}

function leave() {
  location.hash = "#/";
  byId("main").focus();
}

/** A document that nobody has studied yet. */
function showStored(id) {
  const entry = list.entryOf(id);
  const error = el("p", { class: "banner bad", role: "alert", hidden: true });
  const button = el("button", { type: "button", class: "primary", onclick: async () => {
    try {
      const adaptation = await postJson("/v1/adaptations", { document_id: id, method: { type: "refine" } });
      await list.refresh();
      location.hash = `#/${adaptation.id}`;
    } catch (failure) {
      if (!(failure instanceof ApiError)) throw failure;
      error.textContent = failure.message;
      error.hidden = false;
    }
  } }, "Study it");
  byId("study").replaceChildren(
    el("h1", { id: "study-title", tabindex: "-1" }, el("bdi", {}, visible(entry?.title ?? "Document"))),
    el("p", { class: "lead" }, "This document is stored and has not been studied."), error, button);
}

async function health() {
  try {
    const { model, status } = await getJson("/health");
    const words = { ready: "ready", draining: "shutting down", not_ready: "starting" };
    const state = `\u00a0${words[status] ?? status}`;
    if (byId("server").textContent !== `${model}:${state}`) { // said again, it would be read out again
      // on a narrow screen the name is cut, and not the state
      byId("server").replaceChildren(el("span", { class: "server-name" }, `${model}:`), el("span", {}, state));
    }
    byId("server").className = `server ${status}`;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    byId("server").textContent = error.message;
    byId("server").className = "server not_ready";
  }
}

function watch() {
  setInterval(() => {
    const busy = list.anyActive || (study?.adaptation && isActive(study.adaptation));
    if (!document.hidden && busy) list.refresh();
  }, LIST_INTERVAL_MS);
  setInterval(() => {
    if (!document.hidden) health();
  }, HEALTH_INTERVAL_MS);
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) list.refresh();
  });
}

function setUpKeys() {
  const dialog = byId("key-dialog");
  const open = (message = "") => {
    byId("key-error").textContent = message;
    byId("key-error").hidden = !message;
    if (dialog.open) return; // a key may be half typed
    byId("key").value = apiKey();
    dialog.showModal();
    byId("key").focus();
  };
  const use = (key) => {
    setApiKey(key);
    dialog.close();
    list.refresh().then(route);
  };
  hooks.unauthorized = open;
  byId("key-button").addEventListener("click", () => open());
  byId("key-cancel").addEventListener("click", () => dialog.close());
  byId("key-forget").addEventListener("click", () => use(""));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    use(byId("key").value.trim());
  });
  for (const answer of ["yes", "no"]) {
    byId(`confirm-${answer}`).addEventListener("click", () => byId("confirm").close(answer));
  }
}

byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
addEventListener("hashchange", route);
setUpKeys();
health();
await list.refresh();
await route();
watch();
