// The list of conversations: choose, rename, delete.

import { iconButton } from "./messages.js";

export class Sidebar {
  /** `actions` has choose(id), rename(id, title), remove(id). */
  constructor(list, actions) {
    this.list = list;
    this.actions = actions;
    list.addEventListener("click", (event) => this.#clicked(event));
    list.addEventListener("dblclick", (event) => {
      const row = event.target.closest("li");
      if (row) this.#edit(row);
    });
  }

  show(conversations, currentId) {
    if (this.list.querySelector("input")) return; // a name is being typed; the list is shown again when it is done
    this.list.replaceChildren(...conversations.map((conversation) => this.#row(conversation, conversation.id === currentId)));
  }

  #row({ id, title }, current) {
    const row = document.createElement("li");
    row.dataset.id = id;
    const name = document.createElement("button");
    name.className = "name";
    name.dataset.do = "choose";
    name.textContent = title || "New conversation";
    if (current) name.setAttribute("aria-current", "page");
    const label = title || "this conversation";
    row.append(name, iconButton("rename", `Rename ${label}`, "edit"), iconButton("remove", `Delete ${label}`, "trash"));
    return row;
  }

  #clicked(event) {
    const button = event.target.closest("[data-do]");
    if (!button) return;
    const row = button.closest("li");
    if (button.dataset.do === "choose") this.actions.choose(row.dataset.id);
    else if (button.dataset.do === "remove") this.actions.remove(row.dataset.id);
    else if (button.dataset.do === "rename") this.#edit(row);
  }

  #edit(row) {
    const input = document.createElement("input");
    const before = row.querySelector(".name").textContent;
    input.value = before;
    input.maxLength = 80;
    input.setAttribute("aria-label", "Name of the conversation");
    row.replaceChildren(input);
    input.select();
    let open = true;
    const finish = (keep) => {
      if (!open) return;
      open = false;
      input.remove();
      this.actions.rename(row.dataset.id, keep && input.value.trim() ? input.value.trim() : before);
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") finish(false);
      event.stopPropagation();
    });
    input.addEventListener("blur", () => finish(true));
  }
}

/** A short message at the bottom, with an optional action. */
export class Toast {
  #timer = 0;

  constructor(node) {
    this.node = node;
    this.text = node.querySelector("span");
    this.button = node.querySelector("button");
    this.button.addEventListener("click", () => {
      this.node.hidden = true;
      this.act?.();
    });
  }

  show(text, label = "", act = null) {
    clearTimeout(this.#timer);
    this.text.textContent = text;
    this.button.textContent = label;
    this.button.hidden = !act;
    this.act = act;
    this.node.hidden = false;
    this.#timer = setTimeout(() => (this.node.hidden = true), 6000);
  }
}

