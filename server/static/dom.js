/* Elements made from data. Strings become text nodes, never markup; there is no way to pass markup. */

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element; `props` are attributes, or listeners where the name begins with "on". */
export function el(tag, props, ...children) {
  return filled(document.createElement(tag), props, children);
}

/** An SVG element, as `el`. */
export function svg(tag, props, ...children) {
  return filled(document.createElementNS(SVG, tag), props, children);
}

function filled(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** The element with this id; it is part of index.html. */
export function byId(id) {
  return document.getElementById(id);
}

/** Tell a screen reader, without moving the focus. */
export function announce(text) {
  byId("live").textContent = text;
}

const CONTROLS = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

/** Text in which characters that would act on the page, such as a reversal of direction, are seen. */
export function visible(text) {
  return text.replace(CONTROLS, (char) => {
    const code = char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return `\u27e8U+${code}\u27e9`;
  });
}

/** A foreign text on one line, kept from changing the direction of what stands around it. */
export function quoted(text, props) {
  return el("bdi", props, visible(text).replace(/\r?\n|\r/g, "\u21b5").replace(/\t/g, "\u21e5"));
}
