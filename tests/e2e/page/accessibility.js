/* What is wrong for people who do not see the page, or see it badly: names, ids, headings, contrast. */
() => {
  const wrong = [];
  const seen = (node) => node.checkVisibility() && node.getClientRects().length > 0;
  const named = (node) => (node.getAttribute("aria-label") || "").trim()
    || (node.getAttribute("aria-labelledby") || "").split(" ")
      .map((id) => document.getElementById(id)?.textContent || "").join("").trim()
    || [...(node.labels || [])].map((label) => label.textContent).join("").trim()
    || (["A", "BUTTON", "SUMMARY"].includes(node.tagName) ? node.textContent.trim() : "");
  for (const node of document.querySelectorAll("a, button, input, select, textarea, summary, " +
      "[tabindex='0'], [role=img], [role=region], dialog, nav, progress, section[aria-label]")) {
    if (seen(node) && !named(node)) wrong.push(`no name: ${node.outerHTML.slice(0, 120)}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  ids.filter((id, i) => ids.indexOf(id) !== i).forEach((id) => wrong.push(`twice: ${id}`));
  for (const node of document.querySelectorAll("img")) {
    if (!node.hasAttribute("alt")) wrong.push("an image without alt");
  }
  const levels = [...document.querySelectorAll("main :is(h1, h2, h3, h4)")].filter(seen)
    .map((node) => Number(node.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1 || levels[0] !== 1) wrong.push("headings");
  levels.forEach((level, i) => { if (i && level > levels[i - 1] + 1) wrong.push("a level is skipped"); });
  // contrast: the colour of each text against what is painted behind it
  const rgba = (text) => (text.match(/[\d.]+/g) || []).map(Number);
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, [r, g, b, a = 1]) =>
      [r, g, b].map((part, i) => a * part + (1 - a) * below[i]), [255, 255, 255]);
  };
  const light = (rgb) => rgb.map((part) => part / 255)
    .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !seen(node) || node.closest(":disabled, svg")) continue;
    const colour = light(rgba(getComputedStyle(node).color).slice(0, 3));
    const ground = light(behind(node));
    const ratio = (Math.max(colour, ground) + 0.05) / (Math.min(colour, ground) + 0.05);
    if (ratio < 4.5) wrong.push(`contrast ${ratio.toFixed(2)}: ${node.outerHTML.slice(0, 80)}`);
  }
  return [...new Set(wrong)].slice(0, 12);
}
