/** @file Asks for the API key, where the server needs one, and, where the page has a field for it, the labeler's name. */

import { byId } from "./element.js";
import { recall, remember } from "./device.js";

/** @returns {string | null} the labeler's name; null where they gave none: judgements then stand under the key's */
export function labelerName() {
  return recall("labeler")?.name || null;
}

/** @returns {boolean} whether this person was asked for their name in this browser */
export function isIntroduced() {
  return recall("labeler") !== null;
}

/** The form. It forgets the key as soon as it has handed it on. */
export class SignIn {
  #form = byId("sign-in");
  /** @type {HTMLInputElement} */
  #key = byId("key");
  /** @type {HTMLInputElement | null} */
  #labeler = document.querySelector("#labeler");

  /** @param {(key: string | null) => void} onDone gets null where no key was asked for */
  constructor(onDone) {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      const key = this.#key.value.trim();
      this.#key.value = "";
      if (this.#labeler) remember("labeler", { name: this.#labeler.value.trim() });
      onDone(this.#key.required ? key : null);
    });
  }

  /**
   * @param {boolean} keyNeeded
   * @param {string} [problem] why it is asked again
   */
  ask(keyNeeded, problem = "") {
    byId("key-field").hidden = !keyNeeded;
    this.#key.required = keyNeeded;
    if (this.#labeler) this.#labeler.value = labelerName() ?? "";
    byId("sign-in-problem").textContent = problem;
    (keyNeeded ? this.#key : this.#labeler)?.focus();
  }
}
