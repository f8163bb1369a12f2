/** @file Single keys, anywhere on the page except where text is written. */

import { forget, recall, remember } from "./device.js";

const TEXT_FIELDS = "input:not([type=radio]):not([type=checkbox]), textarea, select, [contenteditable]";
const PRESSED_BY_ENTER = "button, a, summary";

/** Calls what a key is bound to. A person whose assistive technology needs single keys can turn them off. */
export class Keyboard {
  #bindings;

  /** @param {Record<string, (key: string) => void>} bindings by `KeyboardEvent.key` */
  constructor(bindings) {
    this.#bindings = bindings;
    document.addEventListener("keydown", (event) => this.#pressed(event));
    document.addEventListener("mousedown", releaseFocus);
  }

  /** Whether single keys act. */
  get enabled() {
    return recall("keys-off") === null;
  }

  set enabled(on) {
    if (on) forget("keys-off");
    else remember("keys-off", true);
  }

  /** @param {KeyboardEvent} event */
  #pressed(event) {
    const target = /** @type {Element} */ (event.target);
    const bound = this.#bindings[event.key];
    if (!bound || event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
    if (!this.enabled || document.querySelector("dialog[open]") || target.closest(TEXT_FIELDS)) return;
    if (event.key === "Enter" && target.closest(PRESSED_BY_ENTER)) return;
    event.preventDefault();
    bound(event.key);
  }
}

/**
 * A button pressed with the mouse does not take the focus: Enter would press it again, where it should submit.
 *
 * @param {MouseEvent} event
 */
function releaseFocus(event) {
  if (!(/** @type {Element} */ (event.target).closest(".tray button, .number"))) return;
  event.preventDefault();
  if (document.activeElement instanceof HTMLElement) document.activeElement.blur();
}
