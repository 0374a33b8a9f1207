// Markdown → DOM nodes. Nothing that the model writes is ever parsed as HTML: text goes into text nodes, and links
// lead to http, https and mailto only. Pictures become links, since the page loads nothing from elsewhere.

/** Shows `source` in `target`; blocks that have not changed since the last call stay as they are. */
export function render(target, source) {
  const blocks = split(source);
  const old = target.blocks ?? [];
  let same = 0;
  while (same < blocks.length && same < old.length && blocks[same] === old[same]) same++;
  while (target.childNodes.length > same) target.lastChild.remove();
  for (const block of blocks.slice(same)) target.append(blockNode(block));
  target.blocks = blocks;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(\s+|$)/;
const DIVIDER = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** The source of each block, from its first line to its last. */
function split(source) {
  const lines = source.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) { at++; continue; }
    const end = endOf(lines, at);
    blocks.push(lines.slice(at, end).join("\n"));
    at = end;
  }
  return blocks;
}

/** Where the block ends that begins at line `at`. */
function endOf(lines, at) {
  const first = lines[at];
  const fence = FENCE.exec(first);
  let end = at + 1;
  if (fence) {
    const close = fence[1];
    while (end < lines.length) {
      const line = lines[end++].trim();
      if (line.length >= close.length && line === close[0].repeat(line.length)) break;
    }
    return end;
  }
  if (HEADING.test(first) || RULE.test(first)) return end;
  if (QUOTE.test(first)) {
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    return end;
  }
  if (ITEM.test(first)) {
    // Up to a line that is neither an item nor indented; a single empty line may stand between.
    while (end < lines.length) {
      const next = lines[end].trim() ? end : end + 1;
      if (next >= lines.length || !lines[next].trim()) break;
      if (!ITEM.test(lines[next]) && !/^\s{2,}/.test(lines[next]) && next !== end) break;
      if (RULE.test(lines[next]) || HEADING.test(lines[next]) || FENCE.test(lines[next]) && !/^\s/.test(lines[next])) break;
      end = next + 1;
    }
    return end;
  }
  if (isTable(lines, at)) {
    while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end++;
    return end;
  }
  while (end < lines.length && lines[end].trim() && !FENCE.test(lines[end]) && !HEADING.test(lines[end])
    && !RULE.test(lines[end]) && !QUOTE.test(lines[end]) && !ITEM.test(lines[end]) && !isTable(lines, end)) end++;
  return end;
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DIVIDER.test(lines[at + 1])
    && lines[at + 1].includes("|");
}

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function blockNode(block) {
  const lines = block.split("\n");
  const [first] = lines;
  const fence = FENCE.exec(first);
  if (fence) return codeNode(lines, fence);
  const heading = HEADING.exec(first);
  if (heading) return element(`h${heading[1].length}`, ...inline(heading[2]));
  if (RULE.test(first)) return element("hr");
  if (QUOTE.test(first)) {
    const inner = lines.map(line => line.replace(QUOTE, "")).join("\n");
    return element("blockquote", ...split(inner).map(blockNode));
  }
  if (ITEM.test(first)) return listNode(lines);
  if (isTable(lines, 0)) return tableNode(lines);
  return element("p", ...inline(lines.map(line => line.trimStart()).join("\n")));
}

function codeNode(lines, fence) {
  const last = lines.at(-1).trim();
  const closed = lines.length > 1 && last.length >= fence[1].length && last === fence[1][0].repeat(last.length);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.addEventListener("click", () => copyText(text, copy));
  const box = element("div", element("header", element("span", fence[2].trim().split(/\s/)[0]), copy),
    element("pre", element("code", text)));
  box.className = "code";
  return box;
}

function listNode(lines) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(mark);
  const list = element(ordered ? "ol" : "ul");
  if (ordered && parseInt(mark) !== 1) list.start = parseInt(mark);
  let item = [];
  const close = () => {
    if (!item.length) return;
    const blocks = split(item.join("\n"));
    const nodes = blocks.map(blockNode);
    // The text of a tight item stands in it directly.
    if (nodes[0]?.tagName === "P") nodes.splice(0, 1, ...nodes[0].childNodes);
    list.append(element("li", ...nodes));
  };
  for (const line of lines) {
    const start = ITEM.exec(line);
    if (start && start[1].length <= indent.length + 1) {
      close();
      item = [line.slice(start[0].length)];
    } else {
      item.push(line.replace(new RegExp(`^ {0,${indent.length + mark.length + 1}}`), ""));
    }
  }
  close();
  return list;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"));
}

function tableNode([head, divider, ...rows]) {
  const sides = cells(divider).map(cell => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const row = (line, kind) => element("tr", ...cells(line).slice(0, sides.length).map((cell, index) => {
    const node = element(kind, ...inline(cell));
    node.style.textAlign = sides[index];
    return node;
  }));
  const table = element("table", element("thead", row(head, "th")), element("tbody", ...rows.map(line => row(line, "td"))));
  const box = element("div", table);
  box.className = "table";
  return box;
}

const INLINE = new RegExp([
  /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)/,                 // 1, 2: code
  /\\([\\`*_{}[\]()#+\-.!|~<>])/,                         // 3: a character as it is
  /!?\[((?:[^[\]\\]|\\.)*)\]\(\s*<?([^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\s*\)/, // 4, 5: a link
  /(\*\*|__)(?=\S)([\s\S]*?\S)\6/,                        // 6, 7: strong
  /~~(?=\S)([\s\S]*?\S)~~/,                               // 8: struck out
  /(?<![*\w])\*(?=[^\s*])((?:[^*]|\*\*[^*]*\*\*)*?[^\s*])\*(?!\*)/, // 9: emphasis
  /(?<!\w)_(?=[^\s_])([^_]*[^\s_])_(?!\w)/,               // 10: emphasis
  /(?<!\w)(https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]*_])/, // 11: an address
  / {2,}\n|\\\n/,                                         // a line's end that counts
].map(part => part.source).join("|"), "g");

/** The nodes of a stretch of text. */
function inline(text) {
  const nodes = [];
  let done = 0;
  // A copy: the calls inside use it too.
  const pattern = new RegExp(INLINE);
  for (let found; (found = pattern.exec(text));) {
    if (found.index > done) nodes.push(text.slice(done, found.index));
    done = pattern.lastIndex;
    const [whole, , code, plain, label, address, , strong, struck, star, low, url] = found;
    if (code !== undefined) nodes.push(element("code", code.replace(/^ (.*\S.*) $/s, "$1").replaceAll("\n", " ")));
    else if (plain !== undefined) nodes.push(plain);
    else if (label !== undefined) nodes.push(linkNode(address, inline(label), whole));
    else if (strong !== undefined) nodes.push(element("strong", ...inline(strong)));
    else if (struck !== undefined) nodes.push(element("del", ...inline(struck)));
    else if (star ?? low) nodes.push(element("em", ...inline(star ?? low)));
    else if (url !== undefined) nodes.push(linkNode(url, [url], whole));
    else nodes.push(element("br"));
  }
  if (done < text.length) nodes.push(text.slice(done));
  return nodes;
}

function linkNode(address, children, whole) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return document.createTextNode(whole);
  const link = element("a", ...(children.length ? children : [address]));
  link.href = address;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}

/** Puts `text` on the clipboard, and says so on `button`. */
export async function copyText(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "No clipboard";
  }
  setTimeout(() => { button.textContent = label; }, 1200);
}
