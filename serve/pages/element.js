/** @file Makes elements. Strings become text nodes, so nothing that a model wrote can become markup. */

/**
 * @param {string} tag
 * @param {Record<string, string | boolean | EventListener>} [properties] attributes; `true` sets an empty one, `false`
 *     none; a function listens to the event of that name
 * @param {...(Node | string)} children
 * @returns {HTMLElement}
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/**
 * The element of that id, which the page must have.
 *
 * @template {HTMLElement} [T=HTMLElement]
 * @param {string} id
 * @returns {T}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no element #${id}`);
  return /** @type {T} */ (found);
}
