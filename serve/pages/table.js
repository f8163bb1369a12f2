/** @file A table that becomes a stack of cards where there is no room for it, and stays a table to those who listen. */

import { element } from "./element.js";

/**
 * @typedef {Node | string} Cell
 */

/**
 * @param {string} caption
 * @param {readonly string[]} columns the first names its row
 * @param {readonly (readonly Cell[])[]} rows
 * @param {string} none what stands there without rows
 * @returns {HTMLElement}
 */
export function table(caption, columns, rows, none) {
  if (rows.length === 0) return element("p", { class: "soft" }, none);
  const heads = columns.map((name) => element("th", { role: "columnheader", scope: "col" }, name));
  return element(
    "table",
    { role: "table", "aria-label": caption },
    element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...heads)),
    element("tbody", { role: "rowgroup" }, ...rows.map((cells) => row(columns, cells))),
  );
}

/**
 * @param {readonly string[]} columns
 * @param {readonly Cell[]} cells
 * @returns {HTMLElement}
 */
function row(columns, cells) {
  const [first, ...others] = cells;
  return element(
    "tr",
    { role: "row" },
    element("th", { role: "rowheader", scope: "row", "data-column": columns[0] }, first),
    ...others.map((cell, place) => element("td", { role: "cell", "data-column": columns[place + 1] }, cell)),
  );
}
