// The right-hand panel: live figures of the server, and the sampling settings.

import { fetchStats } from "./api.js";
import { seconds } from "./messages.js";
import { DEFAULTS, loadSettings, saveSettings } from "./store.js";

const HISTORY = 60;

/** Polls the server's figures while somebody looks. */
export class Live {
  #rates = [];
  #timer = 0;

  /** `isWatched()` says whether the figures are on screen; `onModel(name)` is told what is served. */
  constructor(isWatched, onModel) {
    this.isWatched = isWatched;
    this.onModel = onModel;
    document.addEventListener("visibilitychange", () => this.#poll());
    this.#poll();
  }

  /** Look now, for instance because the panel was opened. */
  wake() {
    this.#poll();
  }

  async #poll() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    const stats = await fetchStats();
    this.onModel(stats?.model ?? null);
    if (stats) this.#show(stats);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#poll(), this.isWatched() ? 1000 : 10_000);
  }

  #show(stats) {
    const put = (id, text) => (document.getElementById(`live-${id}`).textContent = text);
    const rate = stats.output_tokens_per_s;
    put("rate", rate < 100 ? rate.toFixed(1) : Math.round(rate));
    put("running", stats.running);
    put("waiting", stats.waiting);
    put("ttft", stats.ttft_s === null ? "–" : seconds(stats.ttft_s));
    put("hits", stats.prefix_hit_rate === null ? "–" : `${Math.round(100 * stats.prefix_hit_rate)} %`);
    put("blocks", `${stats.blocks_used} of ${stats.blocks_total} used, ${stats.blocks_cached} kept`);
    const meter = document.getElementById("meter");
    const share = (blocks) => (100 * blocks) / Math.max(1, stats.blocks_total);
    meter.setAttribute("aria-valuenow", share(stats.blocks_used).toFixed(0));
    meter.querySelector(".used").style.width = `${share(stats.blocks_used)}%`;
    meter.querySelector(".cached").style.width = `${share(stats.blocks_cached)}%`;
    this.#spark(rate);
  }

  #spark(rate) {
    this.#rates = [...this.#rates, rate].slice(-HISTORY);
    const top = Math.max(1, ...this.#rates);
    const first = HISTORY - this.#rates.length;
    const points = this.#rates.map((value, index) => `${((first + index) * 240) / (HISTORY - 1)},${46 - (44 * value) / top}`);
    document.querySelector("#spark polyline").setAttribute("points", points.join(" "));
  }
}

/** The form of sampling settings; `values` is what it holds. Empty fields are null and are not sent. */
export class Settings {
  constructor(form) {
    this.form = form;
    this.values = loadSettings();
    this.#fill();
    form.addEventListener("input", () => this.#read());
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", (event) => {
      event.preventDefault();
      this.values = { ...DEFAULTS };
      saveSettings(this.values);
      this.#fill();
    });
  }

  #fill() {
    for (const [name, value] of Object.entries(this.values)) {
      const field = this.form.elements[name];
      if (field) field.value = value ?? "";
    }
    this.#label();
  }

  #read() {
    for (const name of Object.keys(DEFAULTS)) {
      const field = this.form.elements[name];
      field.setAttribute("aria-invalid", String(!field.validity.valid));
      if (!field.validity.valid) continue; // keep the last good value, and show that this one is not
      this.values[name] = name === "system" ? field.value : field.value === "" ? null : Number(field.value);
    }
    saveSettings(this.values);
    this.#label();
  }

  #label() {
    for (const label of this.form.querySelectorAll(".slider")) {
      label.querySelector("b").textContent = Number(label.querySelector("input").value).toFixed(2);
    }
  }
}
