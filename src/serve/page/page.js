// The chat page: conversations in this browser's storage, answers from the server that the page came from.

import { copyText, render } from "./markdown.js";

const $ = id => document.getElementById(id);

/** The settings that are numbers: name, label, step, least, most. */
const NUMBERS = [
  ["temperature", "Temperature", 0.05, 0, 5], ["max_tokens", "Longest answer", 1, 1],
  ["top_k", "Top-k", 1, 0], ["top_p", "Top-p", 0.01, 0, 1],
  ["min_p", "Min-p", 0.01, 0, 1], ["typical_p", "Typical-p", 0.01, 0, 1],
  ["top_n_sigma", "Top-nσ", 0.1, -1], ["repeat_penalty", "Repeat penalty", 0.01, 0.01],
  ["presence_penalty", "Presence penalty", 0.1], ["frequency_penalty", "Frequency penalty", 0.1],
  ["dry_multiplier", "DRY multiplier", 0.1, 0], ["xtc_probability", "XTC probability", 0.05, 0, 1],
  ["seed", "Seed", 1],
];

function load(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function save(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    say("The browser's storage is full: delete some conversations, or this one will not be kept.");
  }
}

let settings = load("fewbit.settings", {});
let chats = load("fewbit.chats", []);
/** The conversation that is shown; in `chats` as soon as something was said. */
let chat = chats[0] ?? empty();
/** The answer that is being written: its message, its conversation, and what stops it. */
let answer = null;
let server = null;

function empty() {
  return { id: crypto.randomUUID?.() ?? String(Date.now()), title: "New conversation", messages: [] };
}

function keep(which) {
  chats = [which, ...chats.filter(other => other.id !== which.id)];
  save("fewbit.chats", chats);
}

function say(text) { $("status").textContent = text; }

// What is shown

function element(name, className, ...children) {
  const node = document.createElement(name);
  node.className = className;
  node.append(...children);
  return node;
}

function button(label, name, act) {
  const node = element("button", name, label);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

function showList() {
  $("list").replaceChildren(...chats.map(entry => {
    const name = button(entry.title, "name", () => open(entry.id));
    name.title = entry.title;
    const remove = button("✕", "delete", () => forget(entry.id));
    remove.setAttribute("aria-label", `Delete ${entry.title}`);
    const item = element("li", entry.id === chat.id ? "now" : "", name, remove);
    return item;
  }));
  $("title").textContent = chat.title;
}

function showLog() {
  const hello = element("p", "hello", server ? `Ask ${server.model} something.` : "");
  $("log").replaceChildren(...(chat.messages.length ? chat.messages.map(messageNode) : [hello]));
  toEnd();
}

function messageNode(message) {
  const text = element("div", "text");
  const tools = element("div", "tools");
  const node = element("article", `message ${message.role}`, text, tools);
  node.message = message;
  fill(node);
  return node;
}

/** Shows a message as it is now. */
function fill(node) {
  const { message } = node;
  const [text, tools] = node.children;
  const working = answer?.message === message;
  if (message.role === "user") text.textContent = message.content;
  else render(text, message.content);
  text.classList.toggle("waiting", working && !message.content);
  node.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
  node.setAttribute("aria-busy", working);
  if (working) { tools.replaceChildren(); return; }
  const items = [button("Copy", "copy", event => copyText(message.content, event.target))];
  if (message.role === "user") items.push(button("Edit", "edit-message", () => edit(node)));
  else items.push(button("Retry", "retry", () => retry(message)));
  if (message.note) items.push(element("span", "note", message.note));
  if (message.cut) items.push(element("span", "cut", "– cut: the longest length, or the end of the context, is reached"));
  if (message.error) items.push(element("span", "error", message.error));
  tools.replaceChildren(...items);
}

function nodeOf(message) {
  return [...$("log").children].find(node => node.message === message);
}

/** Whether the reader looks at the end, and so wants to see what comes. */
function atEnd() {
  const { scrollTop, scrollHeight, clientHeight } = $("scroll");
  return scrollHeight - scrollTop - clientHeight < 40;
}

function toEnd() { $("scroll").scrollTop = $("scroll").scrollHeight; }

function showWorking() {
  $("send").hidden = Boolean(answer);
  $("stop").hidden = !answer;
}

// What can be done

function open(id) {
  chat = chats.find(entry => entry.id === id) ?? empty();
  document.body.classList.remove("menu");
  $("menu").setAttribute("aria-expanded", "false");
  showList();
  showLog();
  $("input").focus();
}

function forget(id) {
  if (answer?.chat.id === id) stop();
  chats = chats.filter(entry => entry.id !== id);
  save("fewbit.chats", chats);
  if (chat.id === id) open(chats[0]?.id);
  else showList();
}

function stop() { answer?.control.abort(); }

function send(text) {
  if (!text.trim() || answer) return;
  if (!chat.messages.length) chat.title = text.trim().split("\n")[0].slice(0, 60);
  chat.messages.push({ role: "user", content: text });
  respond();
}

/** Answers anew what stands before `message`. */
function retry(message) {
  if (answer) return;
  chat.messages.length = chat.messages.indexOf(message);
  respond();
}

/** Changes a message and answers it anew. */
function edit(node) {
  if (answer) return;
  const { message } = node;
  const field = element("textarea", "edit");
  field.value = message.content;
  field.rows = Math.min(12, message.content.split("\n").length + 1);
  field.setAttribute("aria-label", "Edit the message");
  const done = () => {
    if (!field.value.trim() || answer) return;
    const at = chat.messages.indexOf(message);
    if (at === 0) chat.title = field.value.trim().split("\n")[0].slice(0, 60);
    chat.messages.length = at;
    chat.messages.push({ role: "user", content: field.value });
    respond();
  };
  field.addEventListener("keydown", event => {
    if (event.key === "Escape") { event.stopPropagation(); showLog(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); done(); }
  });
  const [, tools] = node.children;
  node.firstChild.replaceWith(field);
  tools.replaceChildren(button("Send", "done", done), button("Cancel", "cancel", showLog));
  field.focus();
}

function headers() {
  return settings.key ? { Authorization: `Bearer ${settings.key}` } : {};
}

function request(messages) {
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  const body = { messages: [...system, ...messages.map(({ role, content }) => ({ role, content }))] };
  for (const [name] of NUMBERS) if (typeof settings[name] === "number") body[name] = settings[name];
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

async function respond() {
  const message = { role: "assistant", content: "" };
  const mine = { chat, message, control: new AbortController() };
  answer = mine;
  const asked = [...chat.messages];
  chat.messages.push(message);
  keep(chat);
  showList();
  showLog();
  showWorking();
  say("");
  let drawn = 0;
  const draw = () => {
    drawn = 0;
    const node = nodeOf(message);
    if (!node) return;
    const follow = atEnd();
    fill(node);
    if (follow) toEnd();
  };
  const clock = { begun: performance.now(), first: 0, pieces: 0 };
  try {
    for await (const chunk of stream(request(asked), mine.control.signal)) {
      const piece = chunk.choices?.[0]?.delta?.content;
      if (piece) {
        clock.first ||= performance.now();
        clock.pieces++;
        message.content += piece;
        drawn ||= requestAnimationFrame(draw);
        const time = (performance.now() - clock.first) / 1000;
        if (chat === mine.chat && time > 0.5) say(`${((clock.pieces - 1) / time).toFixed(1)} tok/s`);
      }
      if (chunk.choices?.[0]?.finish_reason === "length") message.cut = true;
      if (chunk.timings) {
        const speed = chunk.timings.predicted_per_second;
        message.note = `${chunk.timings.predicted_n} tokens${speed ? `, ${speed.toFixed(1)} tok/s` : ""}`;
      }
      if (chunk.usage && server) message.note += `, context ${chunk.usage.total_tokens} of ${server.context}`;
    }
  } catch (error) {
    if (mine.control.signal.aborted) message.error = "Stopped.";
    else message.error = error instanceof TypeError ? "The server cannot be reached; is it running?" : error.message;
  }
  if (drawn) cancelAnimationFrame(drawn);
  answer = null;
  say("");
  if (chats.some(entry => entry.id === mine.chat.id)) keep(mine.chat);
  showList();
  showWorking();
  draw();
}

/** The chunks of a streamed answer. */
async function* stream(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) {
    if (response.status === 401) { showSettings(); throw new Error("The server asks for its API key: see the settings."); }
    const problem = await response.json().catch(() => null);
    throw new Error(problem?.error?.message ?? `The server answers with status ${response.status}.`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection broke off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

// Settings

const form = document.querySelector("#settings form");

for (const [name, label, step, least, most] of NUMBERS) {
  const field = element("input", "");
  Object.assign(field, { name, type: "number", step: "any", min: least ?? "", max: most ?? "" });
  field.dataset.step = step;
  field.addEventListener("keydown", event => {
    // Arrows go in useful steps, but any number may be typed.
    const way = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!way) return;
    event.preventDefault();
    const from = field.value === "" ? Number(field.placeholder) || 0 : Number(field.value);
    field.value = Math.min(most ?? Infinity, Math.max(least ?? -Infinity, Number((from + way * step).toFixed(6))));
    field.dispatchEvent(new Event("input", { bubbles: true }));
  });
  $("numbers").append(element("label", "", label, field));
}

function showSettings() {
  for (const field of form.elements) if (field.name) field.value = settings[field.name] ?? (field.name === "theme" ? "auto" : "");
  if (!$("settings").open) $("settings").showModal();
}

form.addEventListener("input", () => {
  settings = {};
  for (const field of form.elements) {
    if (!field.name || field.value === "" || !field.validity.valid) continue;
    settings[field.name] = field.type === "number" ? Number(field.value) : field.value;
  }
  save("fewbit.settings", settings);
  theme();
});
$("settings").addEventListener("close", () => { if (!server) meet(); $("input").focus(); });
$("open-settings").addEventListener("click", showSettings);
$("reset-settings").addEventListener("click", () => {
  settings = { system: settings.system, key: settings.key, theme: settings.theme };
  save("fewbit.settings", settings);
  showSettings();
});

const dark = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  const wanted = settings.theme ?? "auto";
  document.documentElement.dataset.theme = wanted === "auto" ? (dark.matches ? "dark" : "light") : wanted;
}
dark.addEventListener("change", theme);

// Typing

function fit() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}
$("input").addEventListener("input", fit);
$("form").addEventListener("submit", event => {
  event.preventDefault();
  if (answer) return;
  send($("input").value);
  $("input").value = "";
  fit();
});
$("input").addEventListener("keydown", event => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("form").requestSubmit();
  } else if (event.key === "ArrowUp" && !$("input").value) {
    const last = chat.messages.findLast(message => message.role === "user");
    if (last && !answer) { event.preventDefault(); edit(nodeOf(last)); }
  }
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && answer && !$("settings").open) stop();
  if (event.key.toLowerCase() === "o" && event.ctrlKey && event.shiftKey) { event.preventDefault(); open(); }
});
$("new").addEventListener("click", () => open());
$("stop").addEventListener("click", stop);
$("menu").addEventListener("click", event => {
  event.stopPropagation();
  const shown = document.body.classList.toggle("menu");
  $("menu").setAttribute("aria-expanded", shown);
});
document.querySelector("main").addEventListener("click", () => document.body.classList.remove("menu"));
// Another tab has said something.
addEventListener("storage", event => {
  if (event.key !== "fewbit.chats" || answer) return;
  chats = load("fewbit.chats", []);
  chat = chats.find(entry => entry.id === chat.id) ?? chat;
  showList();
  showLog();
});

/** A number that the server keeps in 32 bits. */
function rounded(number) { return typeof number === "number" ? Number(number.toPrecision(6)) : ""; }

/** Asks the server what it is. */
async function meet() {
  try {
    const response = await fetch("props", { headers: headers() });
    if (response.status === 401) { showSettings(); say("The server asks for its API key."); return; }
    server = await response.json();
  } catch {
    say("The server cannot be reached; is it running?");
    return;
  }
  say("");
  $("model").textContent = server.model;
  document.title = `${server.model} – fewbit`;
  for (const [name] of NUMBERS) {
    form.elements[name].placeholder = { max_tokens: "any", seed: "any" }[name] ?? rounded(server.settings[name]);
  }
  if (!chat.messages.length) showLog();
}

theme();
showList();
showLog();
showWorking();
meet();
