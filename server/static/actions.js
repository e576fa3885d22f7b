/* What a click may end in beside a request: a question before something is deleted, a saved file. */

import { byId, el, visible } from "./dom.js";

/** Ask before something that cannot be undone; true for yes. */
export function confirmed(title, text) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = visible(title);
  byId("confirm-text").textContent = text;
  dialog.returnValue = "";
  dialog.showModal();
  byId("confirm-no").focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Save bytes as a file of this name. */
export function download(blob, name) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name, hidden: true });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
