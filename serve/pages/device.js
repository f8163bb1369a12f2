/**
 * @file What this browser remembers for this server across reloads (local storage belongs to one origin). Never the
 * API key. Where the browser refuses to remember, writing says so and reading finds nothing.
 */

const PREFIX = "instructloop.";

/**
 * @param {string} name
 * @returns {any} what was written under that name, or null
 */
export function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name) ?? "null");
  } catch {
    return null;
  }
}

/**
 * @param {string} name
 * @param {unknown} value
 * @returns {boolean} whether it will survive a reload
 */
export function remember(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** @param {string} name */
export function forget(name) {
  try {
    localStorage.removeItem(PREFIX + name);
  } catch {
    // nothing is remembered here
  }
}

/**
 * @param {string} start
 * @returns {string[]} the remembered names that begin so
 */
export function remembered(start) {
  try {
    const names = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX + start));
    return names.map((name) => name.slice(PREFIX.length));
  } catch {
    return [];
  }
}
