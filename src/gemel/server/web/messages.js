// The list of messages: nodes for what a conversation holds, and only those that changed.

import { render } from "./markdown.js";

/** An icon from the sprite in index.html. */
function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  setIcon(use, name);
  svg.append(use);
  return svg;
}

/** Show another icon in a `use` element. */
export function setIcon(use, name) {
  use.setAttribute("href", `#i-${name}`);
}

/** A button with an icon; its action is found by `data-do` on the list. */
export function iconButton(action, label, name) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet small";
  button.dataset.do = action;
  button.title = label;
  button.setAttribute("aria-label", label);
  button.append(icon(name));
  return button;
}

function block(className, ...children) {
  const node = document.createElement("div");
  node.className = className;
  node.append(...children);
  return node;
}

/** Make `list` show `messages`. `busy` is true while the last of them is being written; `editing` is the index of the one in an editor, or null. */
export function showMessages(list, messages, busy, editing) {
  while (list.children.length > messages.length) list.lastElementChild.remove();
  messages.forEach((message, index) => {
    const last = index === messages.length - 1;
    let node = list.children[index];
    const form = `${message.role}:${editing === index}`;
    if (!node || node.dataset.form !== form) {
      const fresh = message.role === "user" ? userNode(message, editing === index) : assistantNode();
      fresh.dataset.form = form;
      if (node) node.replaceWith(fresh);
      else list.append(fresh);
      node = fresh;
    }
    node.dataset.index = index;
    if (message.role === "user") {
      if (editing !== index) node.querySelector(".said").textContent = message.text;
      node.classList.toggle("locked", busy);
    } else updateAnswer(node, message, busy && last, last);
  });
}

function userNode(message, editing) {
  const node = document.createElement("article");
  node.className = "message user";
  node.setAttribute("aria-label", "You");
  if (!editing) {
    node.append(block("said"), block("actions", iconButton("edit", "Edit and send again", "edit"), iconButton("copy", "Copy message", "copy")));
    return node;
  }
  const area = document.createElement("textarea");
  area.value = message.text;
  area.setAttribute("aria-label", "Edit message");
  area.rows = Math.min(12, message.text.split("\n").length + 1);
  const cancel = textButton("cancel-edit", "Cancel", "plain");
  const save = textButton("save-edit", "Send again", "primary");
  node.append(block("editor", area, block("editor-actions", cancel, save)));
  return node;
}

function textButton(action, label, className) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = className;
  button.dataset.do = action;
  button.textContent = label;
  return button;
}

function assistantNode() {
  const node = document.createElement("article");
  node.className = "message assistant";
  node.setAttribute("aria-label", "Answer");
  const trouble = block("trouble");
  trouble.setAttribute("role", "alert");
  trouble.hidden = true;
  const actions = block(
    "actions",
    iconButton("copy", "Copy answer", "copy"),
    iconButton("regenerate", "Answer again", "redo"),
    iconButton("continue", "Continue this answer", "next"),
    Object.assign(document.createElement("span"), { className: "figures" }),
  );
  node.append(block("prose"), block("pending", document.createElement("i"), document.createElement("i"), document.createElement("i")), trouble, actions);
  return node;
}

function updateAnswer(node, message, writing, last) {
  render(node.querySelector(".prose"), message.text);
  node.classList.toggle("writing", writing);
  node.classList.toggle("last", last);
  node.setAttribute("aria-busy", String(writing));
  node.querySelector(".pending").hidden = !(writing && !message.text);
  const trouble = node.querySelector(".trouble");
  trouble.hidden = !message.error;
  if (trouble.textContent !== (message.error ?? "")) trouble.textContent = message.error ?? "";
  node.querySelector(".actions").hidden = writing;
  node.querySelector("[data-do=regenerate]").hidden = !last;
  node.querySelector("[data-do=continue]").hidden = !last || !message.text || message.finish === "stop";
  node.querySelector(".figures").textContent = figures(message);
}

function figures({ finish, figures: counted }) {
  const parts = [];
  if (finish === "stopped") parts.push("stopped");
  if (finish === "length") parts.push("reached the limit");
  if (counted?.tokens) parts.push(`${counted.tokens} tokens`);
  if (counted?.rate) parts.push(`${counted.rate.toFixed(1)} per second`);
  if (counted?.first_s !== undefined) parts.push(`first after ${seconds(counted.first_s)}`);
  return parts.join(" · ");
}

/** A duration for people. */
export function seconds(duration_s) {
  return duration_s < 1 ? `${Math.round(duration_s * 1000)} ms` : `${duration_s.toFixed(1)} s`;
}
