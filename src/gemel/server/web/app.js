// The page: one state, one function that shows it, and what people can do.

import { chatBody, complete } from "./api.js";
import { setIcon, showMessages } from "./messages.js";
import { Live, Settings } from "./panel.js";
import { Sidebar, Toast } from "./sidebar.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 820px)");
const wide = matchMedia("(min-width: 1180px)");

const EXAMPLES = [
  ["Explain", "Explain to a ten-year-old why the sky is blue and sunsets are red."],
  ["Compare", "Compare TCP and UDP in a short table with three rows."],
  ["Write", "Write a Python function that checks whether a string is a palindrome, with two examples."],
];

const state = {
  conversations: store.loadConversations(),
  current: null, // the conversation on screen; not stored before its first message
  editing: null, // index of the message in an editor
  running: null, // {conversation, controller} while an answer is being written
  pinned: true, // the view follows the end of the text
};

const settings = new Settings($("settings"));
const toast = new Toast($("toast"));
const sidebar = new Sidebar($("conversations"), { choose, rename, remove });
const live = new Live(() => !$("panel").hidden || state.running !== null, showModel);
store.whenFull(() => toast.show("The browser's storage is full: delete some conversations, or this one will be lost."));

// ---- showing -------------------------------------------------------------------------------------------------------------------------

let frame = 0;

/** Show the state at the next frame; any number of calls cost one. */
function refresh() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    show();
  });
}

function show() {
  const { current, running } = state;
  const busyHere = running?.conversation === current;
  showMessages($("messages"), current.messages, busyHere, state.editing);
  $("empty").hidden = current.messages.length > 0;
  $("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} · Gemel` : "Gemel";
  sidebar.show(state.conversations, current.id);
  setIcon($("send-icon"), running ? "stop" : "send");
  $("send").setAttribute("aria-label", running ? "Stop writing" : "Send message");
  $("send").classList.toggle("stops", running !== null);
  $("send").disabled = !running && !$("input").value.trim();
  if (state.pinned) $("scroll").scrollTop = $("scroll").scrollHeight;
}

function showModel(name) {
  $("model").textContent = name === null ? "server not reachable" : name.split("/").at(-1);
  $("model").classList.toggle("lost", name === null);
}

function sizeInput() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, innerHeight * 0.4)}px`;
}

// ---- conversations -------------------------------------------------------------------------------------------------------------------

function keep(conversation) {
  conversation.changed = Date.now();
  state.conversations = [conversation, ...state.conversations.filter(({ id }) => id !== conversation.id)];
  store.saveConversation(conversation);
}

function choose(id) {
  state.current = state.conversations.find((conversation) => conversation.id === id) ?? store.createConversation();
  state.editing = null;
  state.pinned = true;
  rememberPlace();
  openSide(false);
  refresh();
  if (!narrow.matches) $("input").focus();
}

function startNew() {
  choose(null);
}

function rename(id, title) {
  const conversation = state.conversations.find((one) => one.id === id);
  if (conversation && conversation.title !== title && !(title === "New conversation" && !conversation.title)) {
    conversation.title = title;
    store.saveConversation(conversation);
  }
  refresh();
}

function remove(id) {
  const gone = state.conversations.find((one) => one.id === id);
  if (!gone) return;
  if (state.running?.conversation === gone) stop();
  state.conversations = state.conversations.filter((one) => one !== gone);
  store.deleteConversation(id);
  if (state.current === gone) choose(null);
  refresh();
  toast.show("Conversation deleted.", "Undo", () => {
    keep(gone);
    choose(gone.id);
  });
}

function rememberPlace() {
  const known = state.conversations.includes(state.current);
  history.replaceState(null, "", known ? `#${state.current.id}` : location.pathname);
}

// ---- answering -----------------------------------------------------------------------------------------------------------------------

function send(text) {
  const { current } = state;
  if (state.running || !text.trim()) return;
  current.messages.push({ role: "user", text });
  current.title ||= titleOf(text);
  keep(current);
  rememberPlace();
  answer(current, null);
}

/** The first words of the first line. */
function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length <= 60 ? line : `${line.slice(0, 60).replace(/\s+\S*$/, "")}…`;
}

/** Write the next answer of `conversation`, or go on with its last one. */
async function answer(conversation, continued) {
  const controller = new AbortController();
  state.running = { conversation, controller };
  state.editing = null;
  state.pinned = true;
  const message = continued ?? { role: "assistant", text: "" };
  if (!continued) conversation.messages.push(message);
  const before = conversation.messages.slice(0, -1);
  delete message.error;
  delete message.finish;
  live.wake();
  refresh();
  const clock = new Clock();
  try {
    const body = chatBody(settings.values, before, continued ? message.text : null);
    for await (const { text, finish, usage } of complete(body, controller.signal)) {
      if (text) {
        clock.tick();
        message.text += text;
      }
      if (finish) message.finish = finish;
      if (usage) clock.tokens = usage.completion_tokens;
      refresh();
    }
  } catch (error) {
    message.finish = controller.signal.aborted ? "stopped" : "error";
    if (!controller.signal.aborted) message.error = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
  message.figures = clock.figures();
  state.running = null;
  if (state.conversations.includes(conversation)) keep(conversation);
  $("announcer").textContent = message.error ? "" : "The answer is complete.";
  refresh();
}

/** Times of one answer as the reader felt them. */
class Clock {
  start = performance.now();
  first = null;
  last = null;
  pieces = 0;
  tokens = null;

  tick() {
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces += 1;
  }

  figures() {
    if (this.first === null) return undefined;
    const tokens = this.tokens ?? this.pieces;
    const span_s = (this.last - this.first) / 1000;
    return { tokens, first_s: (this.first - this.start) / 1000, rate: span_s > 0.05 && tokens > 1 ? (tokens - 1) / span_s : 0 };
  }
}

function stop() {
  state.running?.controller.abort();
}

function act(action, index) {
  const { current } = state;
  const message = current.messages[index];
  if (action === "copy") return copy(message.text);
  if (state.running) return;
  if (action === "edit") editMessage(index);
  else if (action === "cancel-edit") {
    state.editing = null;
    refresh();
  } else if (action === "save-edit") {
    const text = document.querySelector(".editor textarea").value;
    if (!text.trim()) return;
    current.messages.length = index;
    state.editing = null;
    send(text);
  } else if (action === "regenerate") {
    current.messages.length = index;
    answer(current, null);
  } else if (action === "continue") answer(current, message);
}

function editMessage(index) {
  state.editing = index;
  state.pinned = false;
  show();
  const area = document.querySelector(".editor textarea");
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https browsers hide the clipboard; the old way still works there.
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "visually-hidden";
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast.show("Copied.");
}

// ---- what people do ------------------------------------------------------------------------------------------------------------------

function openSide(open) {
  $("app").classList.toggle("side-open", open);
  shade();
}

function openPanel(open) {
  $("panel").hidden = !open;
  $("panel-toggle").setAttribute("aria-expanded", String(open));
  shade();
  if (open) live.wake();
}

function shade() {
  const covered = ($("app").classList.contains("side-open") && narrow.matches) || (!$("panel").hidden && !wide.matches);
  $("shade").hidden = !covered;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running) return stop();
  const text = $("input").value;
  $("input").value = "";
  sizeInput();
  send(text);
});

$("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!state.running) $("composer").requestSubmit();
});

$("input").addEventListener("input", () => {
  sizeInput();
  refresh();
});

$("messages").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.copy) copy(button.closest(".code").querySelector("pre").textContent);
  else if (button?.dataset.do) act(button.dataset.do, Number(button.closest(".message").dataset.index));
});

$("messages").addEventListener("keydown", (event) => {
  if (!event.target.matches(".editor textarea") || event.isComposing) return;
  const index = Number(event.target.closest(".message").dataset.index);
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    act("save-edit", index);
  } else if (event.key === "Escape") {
    event.stopPropagation();
    act("cancel-edit", index);
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (state.running) stop();
  else if (!$("shade").hidden) closeDrawers();
});

function closeDrawers() {
  openSide(false);
  if (!wide.matches) openPanel(false);
}

$("scroll").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = $("scroll");
  state.pinned = scrollHeight - scrollTop - clientHeight < 60;
});

$("new").addEventListener("click", startNew);
$("side-open").addEventListener("click", () => openSide(true));
$("side-close").addEventListener("click", () => openSide(false));
$("panel-toggle").addEventListener("click", () => openPanel($("panel").hidden));
$("panel-close").addEventListener("click", () => openPanel(false));
$("shade").addEventListener("click", closeDrawers);
$("theme").addEventListener("click", () => store.chooseTheme(store.currentTheme() === "dark" ? "light" : "dark"));
for (const query of [narrow, wide]) query.addEventListener("change", shade);
addEventListener("resize", () => {
  sizeInput();
  refresh();
});

addEventListener("storage", (event) => {
  if (!store.isConversationKey(event.key)) return;
  // Another tab wrote. What this tab is writing or showing stays as it is here.
  const mine = [state.current, state.running?.conversation];
  state.conversations = store.loadConversations().map((one) => mine.find((kept) => kept?.id === one.id) ?? one);
  refresh();
});
addEventListener("pagehide", () => {
  if (state.running) store.saveConversation(state.running.conversation);
});
addEventListener("hashchange", () => choose(location.hash.slice(1)));

for (const [label, text] of EXAMPLES) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(Object.assign(document.createElement("b"), { textContent: label }), text);
  button.addEventListener("click", () => send(text));
  $("examples").append(button);
}

openPanel(wide.matches);
choose(location.hash.slice(1) || null);
