/** @file What went wrong, in words for people. */

import { Refused } from "./api.js";

/**
 * @param {Error} error Refused or Unreachable
 * @returns {string} a sentence: the server's own words, but for 401, where they are for programs
 */
export function inWords(error) {
  if (error instanceof Refused && error.status === 401) return "This needs an API key that the server knows.";
  return `${error.message.charAt(0).toUpperCase()}${error.message.slice(1).replace(/\.?$/, ".")}`;
}
