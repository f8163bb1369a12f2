/** @file Numbers and times as people read them. */

const DIGITS = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const COUNT = new Intl.NumberFormat("en");
const PERCENT = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });
const TIME = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric" });

/**
 * @param {number | string | null} value text where JSON has no number for it, as for NaN
 * @returns {string} three significant digits; a dash for none
 */
export function digits(value) {
  return typeof value === "number" ? DIGITS.format(value) : (value ?? "–");
}

/** @param {number} value */
export function count(value) {
  return COUNT.format(value);
}

/** @param {number} share 0 to 1 */
export function percent(share) {
  return PERCENT.format(share).replace("%", "\u202f%");
}

/**
 * @param {number} part
 * @param {number} whole
 * @returns {string} the share, or a dash where there is nothing to share
 */
export function shareOf(part, whole) {
  return whole > 0 ? percent(part / whole) : "–";
}

/** @param {number} unixSeconds */
export function time(unixSeconds) {
  return TIME.format(unixSeconds * 1000);
}

/** @param {string} iso */
export function day(iso) {
  return DAY.format(new Date(iso));
}
