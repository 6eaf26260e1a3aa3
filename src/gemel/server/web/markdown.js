// Markdown to DOM nodes. There is no HTML string anywhere: text only ever becomes text nodes, so nothing in a model's answer can turn into markup.
// All quantifiers in the patterns are bounded or over disjoint characters, so no input makes them slow.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]{0,40})/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +(.*)|$)/;
const TABLE_RULE = /^\|?:?-+:?(?:\|:?-+:?)*\|?$/;

const INLINE = new RegExp(
  [
    "\\\\(?<escaped>[\\\\`*_{}\\[\\]()#+\\-.!|~>])",
    "(?<ticks>`{1,3})(?<code>[^`]{1,2000})\\k<ticks>",
    "!?\\[(?<label>[^\\[\\]\\n]{0,500})\\]\\((?<url>[^()\\s]{1,2000})(?: +\"[^\"\\n]{0,200}\")?\\)",
    "\\*\\*(?=\\S)(?<strong>[^*]{1,2000}(?:\\*[^*]{1,500}\\*[^*]{0,500})?)\\*\\*",
    "(?<!\\w)__(?=\\S)(?<strong2>[^_]{1,2000})__(?!\\w)",
    "\\*(?=[^\\s*])(?<em>[^*\\n]{1,1000})\\*",
    "(?<!\\w)_(?=[^\\s_])(?<em2>[^_\\n]{1,1000})_(?!\\w)",
    "~~(?=\\S)(?<gone>[^~]{1,1000})~~",
    "(?<bare>https?://[^\\s<>\"'`\\])}]{1,2000})",
  ].join("|"),
  "g",
);

const sources = new WeakMap();

/** Show `text` in `container`. Blocks that did not change since the last call keep their nodes, so a selection survives streaming. */
export function render(container, text) {
  const blocks = split(text.replace(/\r\n?/g, "\n").split("\n"));
  blocks.forEach((block, index) => {
    const old = container.children[index];
    if (old && sources.get(old) === block.source) return;
    const node = block.build();
    sources.set(node, block.source);
    if (old) old.replaceWith(node);
    else container.append(node);
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

function element(name, className, ...children) {
  const node = document.createElement(name);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

/** Top-level blocks as {source, build}. */
function split(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [length, build] = blockAt(lines, at, depth);
    blocks.push({ source: lines.slice(at, at + length).join("\n"), build });
    at += length;
  }
  return blocks;
}

/** The block that starts at line `at`: how many lines it takes, and how to build it. */
function blockAt(lines, at, depth) {
  const line = lines[at];
  let match;
  if ((match = FENCE.exec(line))) return fence(lines, at, match);
  if ((match = HEADING.exec(line))) return [1, () => inline(element(`h${Math.min(6, match[1].length + 1)}`), match[2])];
  if (RULE.test(line)) return [1, () => element("hr")];
  if (QUOTE.test(line) && depth < 8) return quote(lines, at, depth);
  if (ITEM.test(line) && depth < 8) return list(lines, at, depth);
  if (startsTable(lines, at)) return table(lines, at);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines[end]) && !startsTable(lines, end)) end += 1;
  return [end - at, () => inline(element("p"), lines.slice(at, end).join("\n"))];
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || /^ {0,3}(?:[-*+]|1[.)]) +\S/.test(line);
}

function startsTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("|") && TABLE_RULE.test(lines[at + 1].replaceAll(" ", ""));
}

function fence(lines, at, [, marks, language]) {
  let end = at + 1;
  while (end < lines.length && !(lines[end].trim().startsWith(marks) && !lines[end].trim().replaceAll(marks[0], ""))) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  return [Math.min(end, lines.length - 1) - at + 1, () => codeBlock(code, language)];
}

function codeBlock(code, language) {
  const copy = element("button", "copy", "Copy");
  copy.type = "button";
  copy.dataset.copy = "code";
  copy.setAttribute("aria-label", "Copy code");
  const pre = element("pre", "", element("code", "", code));
  pre.tabIndex = 0; // a keyboard can scroll it
  return element("div", "code", element("div", "code-head", element("span", "", language || "text"), copy), pre);
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && lines[end].trim() && (QUOTE.test(lines[end]) || !startsBlock(lines[end]))) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [end - at, () => fill(element("blockquote"), inner, depth + 1)];
}

function fill(node, lines, depth) {
  for (const block of split(lines, depth)) node.append(block.build());
  return node;
}

function list(lines, at, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const items = [];
  let end = at;
  let loose = false;
  while (end < lines.length) {
    const line = lines[end];
    const match = ITEM.exec(line);
    const deep = line.length - line.trimStart().length;
    if (match && deep <= indent.length + 1 && !RULE.test(line)) {
      if (/\d/.test(match[2]) !== ordered) break;
      items.push({ inner: [match[3] ?? ""], width: deep + match[2].length + 1 });
    } else if (!line.trim()) {
      const next = lines.slice(end + 1).find((later) => later.trim());
      if (next === undefined || !(next.startsWith(" ".repeat(indent.length + 2)) || ITEM.test(next))) break;
      loose = true;
      items.at(-1).inner.push("");
    } else if (deep > indent.length + 1 || (lines[end - 1].trim() && !startsBlock(line))) {
      items.at(-1).inner.push(line.slice(Math.min(deep, items.at(-1).width)));
    } else break;
    end += 1;
  }
  const start = ordered ? Number.parseInt(mark, 10) : 1;
  return [end - at, () => buildList(items, ordered, start, loose, depth)];
}

function buildList(items, ordered, start, loose, depth) {
  const node = element(ordered ? "ol" : "ul", loose ? "loose" : "");
  if (ordered && start !== 1) node.start = start;
  for (const { inner } of items) {
    const item = element("li");
    for (const block of split(inner, depth + 1)) {
      const built = block.build();
      if (built.tagName === "P" && !loose) item.append(...built.childNodes);
      else item.append(built);
    }
    node.append(item);
  }
  return node;
}

function table(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const sides = cells(lines[at + 1]).map((rule) => (rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : "left"));
  const row = (line, name) => {
    const texts = cells(line);
    return element("tr", "", ...sides.map((side, column) => inline(element(name, side === "left" ? "" : side), texts[column] ?? "")));
  };
  return [
    end - at,
    () => {
      const head = element("thead", "", row(lines[at], "th"));
      const body = element("tbody", "", ...lines.slice(at + 2, end).map((line) => row(line, "td")));
      const frame = element("div", "table", element("table", "", head, body));
      frame.tabIndex = 0;
      return frame;
    },
  ];
}

function cells(line) {
  const parts = line.trim().replace(/\\\|/g, "\u0000").replace(/^\|/, "").replace(/\|$/, "").split("|");
  return parts.map((part) => part.replaceAll("\u0000", "|").trim());
}

/** Append `text` to `node` with its inline marks. Returns `node`. */
function inline(node, text, depth = 0) {
  let done = 0;
  for (const match of depth < 6 ? text.matchAll(INLINE) : []) {
    plain(node, text.slice(done, match.index));
    node.append(mark(match, depth));
    done = match.index + match[0].length;
  }
  plain(node, text.slice(done));
  return node;
}

function mark(match, depth) {
  const { escaped, code, label, url, strong, strong2, em, em2, gone, bare } = match.groups;
  if (escaped !== undefined) return escaped;
  if (code !== undefined) return element("code", "", code.trim() || code);
  if (url !== undefined) return link(url, element("span", "", label || url), match[0]);
  if (bare !== undefined) {
    const address = bare.replace(/[.,;:!?]{1,10}$/, "");
    const node = element("span", "", link(address, address, address));
    node.append(bare.slice(address.length));
    return node;
  }
  const [name, inner] = (strong ?? strong2) !== undefined ? ["strong", strong ?? strong2] : gone !== undefined ? ["del", gone] : ["em", em ?? em2];
  return inline(element(name), inner, depth + 1);
}

/** A link if `url` is http or https, else the text as it was written. */
function link(url, content, written) {
  let address;
  try {
    address = new URL(url);
  } catch {
    return written;
  }
  if (address.protocol !== "http:" && address.protocol !== "https:") return written;
  const node = element("a", "", content);
  node.href = address.href;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}

function plain(node, text) {
  text.split("\n").forEach((line, index) => {
    if (index) node.append(element("br"));
    if (line) node.append(line);
  });
}
