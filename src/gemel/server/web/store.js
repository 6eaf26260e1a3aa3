// What the browser keeps: conversations (one storage key each, so that two tabs do not overwrite each other's), the settings, the theme.

const CHAT = "gemel.chat.";
const SETTINGS = "gemel.settings";

export const DEFAULTS = {
  system: "",
  temperature: 0.7,
  top_p: 0.95,
  top_k: null,
  min_p: null,
  max_tokens: 1024,
  seed: null,
  presence_penalty: null,
  frequency_penalty: null,
  repetition_penalty: null,
};

let onFull = () => {};

/** Call `handler` when the browser has no room left. */
export function whenFull(handler) {
  onFull = handler;
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    onFull();
  }
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

/** A conversation: {id, title, changed, messages: [{role, text, finish?, error?, figures?}]}. */
export function createConversation() {
  return { id: newId(), title: "", changed: Date.now(), messages: [] };
}

function newId() {
  // randomUUID exists only in secure contexts; a server reached by http in a home network is none.
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** All conversations, newest first. */
export function loadConversations() {
  const found = [];
  for (let at = 0; at < localStorage.length; at += 1) {
    const key = localStorage.key(at);
    const conversation = key.startsWith(CHAT) ? read(key) : null;
    if (conversation && Array.isArray(conversation.messages) && conversation.id) found.push(conversation);
  }
  return found.sort((one, other) => other.changed - one.changed);
}

export function loadConversation(id) {
  return read(CHAT + id);
}

export function saveConversation(conversation) {
  write(CHAT + conversation.id, conversation);
}

export function deleteConversation(id) {
  localStorage.removeItem(CHAT + id);
}

/** Is this storage key a conversation's? */
export function isConversationKey(key) {
  return key === null || key.startsWith(CHAT);
}

export function loadSettings() {
  return { ...DEFAULTS, ...read(SETTINGS) };
}

export function saveSettings(settings) {
  write(SETTINGS, settings);
}

export function currentTheme() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

export function chooseTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("gemel.theme", theme);
  } catch {
    // It lasts for this visit, then.
  }
}
