/** @file Tells the person what has not reached the server yet, and what it would not take. */

import { element } from "./element.js";

/**
 * @param {HTMLElement} root
 * @param {import("./outbox.js").Outbox} outbox
 */
export function showOutbox(root, outbox) {
  const { entries } = outbox;
  const refused = entries.filter((entry) => entry.problem);
  const waiting = entries.length - refused.length;
  root.hidden = entries.length === 0;
  root.replaceChildren();
  if (waiting > 0) {
    const [many, them] = waiting === 1 ? ["1 judgement waits", "it"] : [`${waiting} judgements wait`, "them"];
    const where = outbox.durable
      ? `kept in this browser until the server has taken ${them}`
      : `this browser cannot keep ${them}, so please leave the page open`;
    const sendNow = element("button", { type: "button", click: () => outbox.send() }, "Send now");
    root.append(element("p", {}, `${many} to be sent: ${where}.`, sendNow));
  }
  for (const entry of refused) {
    root.append(
      element(
        "p",
        {},
        `The server did not take ${entry.what}: ${entry.problem}.`,
        element("button", { type: "button", click: () => outbox.retryAll() }, "Try again"),
        element("button", { type: "button", click: () => outbox.discard(entry.key) }, "Discard"),
      ),
    );
  }
}
