/** @file How many comparisons of a labeler's the server has acknowledged today. */

import { recall, remember } from "./device.js";

/**
 * @param {string | null} labeler
 * @returns {number}
 */
export function countToday(labeler) {
  const kept = recall("today");
  return kept?.day === today() && kept.labeler === labeler ? kept.count : 0;
}

/** @param {string | null} labeler */
export function addToToday(labeler) {
  remember("today", { day: today(), labeler, count: countToday(labeler) + 1 });
}

/** @returns {string} the date where the person is */
function today() {
  return new Date().toDateString();
}
