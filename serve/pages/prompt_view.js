/** @file Shows what was asked: a prompt, or the messages of a chat with who says them. */

import { element } from "./element.js";

/** @typedef {import("./tasks.js").Work["asked"]} Asked */

/**
 * @param {HTMLElement} root
 * @param {Asked} asked
 */
export function showPrompt(root, asked) {
  root.replaceChildren(...("prompt" in asked ? [text(asked.prompt)] : asked.messages.flatMap(message)));
}

/**
 * @param {import("./tasks.js").Message} message
 * @param {number} _
 * @param {readonly object[]} all a single message of a user's needs no name
 * @returns {HTMLElement[]}
 */
function message({ role, content }, _, all) {
  const said = text(spoken(content));
  if (all.length === 1 && role === "user") return [said];
  return [element("p", { class: "role" }, String(role ?? "message")), said];
}

/**
 * @param {string} said
 * @returns {HTMLElement}
 */
function text(said) {
  return element("div", { class: "text", dir: "auto" }, said);
}

/**
 * @param {unknown} content a message's: text, or parts
 * @returns {string}
 */
function spoken(content) {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return content == null ? "" : JSON.stringify(content);
  return content.map((part) => (typeof part?.text === "string" ? part.text : "")).join("");
}
