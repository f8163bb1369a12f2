/** @file Says aloud, to those who listen to the page, what others see happen. */

import { byId } from "./element.js";

/** @param {string} sentence */
export function announce(sentence) {
  const region = byId("announcer");
  // A text that stays the same is not read out again; a no-break space makes it another.
  region.textContent = region.textContent === sentence ? `${sentence}\u00a0` : sentence;
}
