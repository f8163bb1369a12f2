/** @file What blind comparisons say of the canary: in words, and how near each decision is. */

import { element } from "./element.js";
import { count, digits, percent } from "./figures.js";

/**
 * @typedef {object} Verdict
 * @property {"better" | "worse" | "not_worse" | "undecided"} decision
 * @property {number} wealth_better
 * @property {number} wealth_worse
 * @property {number} wealth_not_worse
 * @property {number} needed
 * @property {number} wins
 * @property {number} comparisons
 * @property {number} ties
 * @property {boolean} held
 * @property {boolean} must_be_better
 * @property {{task: string, wins: number, losses: number}[]} tasks_down
 * @property {string} said
 *
 * @typedef {object} WinRate
 * @property {number} version
 * @property {number} over
 * @property {number} since
 * @property {number} wins
 * @property {number} losses
 * @property {number} ties
 * @property {number | null} rate
 * @property {number} low
 * @property {number} high
 */

/**
 * @param {HTMLElement} root
 * @param {{canary: number | null, stable: number | null, verdict: Verdict | null}} release
 */
export function showVerdict(root, { canary, stable, verdict }) {
  if (verdict === null) {
    root.replaceChildren(
      element("p", { class: "soft" }, "There is no canary: people's comparisons decide about one while it serves."),
    );
    return;
  }
  const { wins, comparisons, ties, tasks_down } = verdict;
  const down = tasks_down.map(({ task, wins, losses }) =>
    element("li", {}, element("b", {}, task), ` won ${wins} of ${wins + losses}`),
  );
  root.replaceChildren(
    element("p", { class: `lead ${verdict.decision}` }, inWords(verdict, canary, stable)),
    element(
      "p",
      {},
      `Version ${canary} was preferred in ${count(wins)} of ${count(comparisons)} blind comparisons; ` +
        `${count(ties)} more were ties.`,
    ),
    ...(down.length ? [element("p", {}, "It lost on some kinds of task:"), element("ul", {}, ...down)] : []),
    element(
      "div",
      { class: "wealths" },
      ...wealth("better", verdict.wealth_better, verdict.needed),
      ...wealth("not worse", verdict.wealth_not_worse, verdict.needed),
      ...wealth("worse", verdict.wealth_worse, verdict.needed),
    ),
    element("p", { class: "soft" }, `A bet on each of the three decides when it has multiplied its stake by ${digits(verdict.needed)}.`),
  );
}

/**
 * @param {Verdict} verdict
 * @param {number | null} canary
 * @param {number | null} stable
 * @returns {string}
 */
function inWords({ decision, held, must_be_better }, canary, stable) {
  if (decision === "better") return `Version ${canary} is better than version ${stable}.`;
  if (decision === "worse") return `Version ${canary} is worse than version ${stable}.`;
  if (decision === "not_worse") {
    const yet = must_be_better ? ", but after several such versions this one must be better" : "";
    return `Version ${canary} is not worse than version ${stable}, within the margin${yet}.`;
  }
  return held ? "Undecided, and held: an operator must decide." : "Undecided yet: it goes on.";
}

/**
 * @param {string} name
 * @param {number} wealth the highest reached
 * @param {number} needed
 * @returns {HTMLElement[]} a row: name, bar, figure. Wealth is multiplied bet by bet, so the bar is of its logarithm.
 */
function wealth(name, wealth, needed) {
  const done = Math.min(1, Math.max(0, Math.log(wealth) / Math.log(needed)));
  return [
    element("span", {}, name),
    element("progress", { max: "1", value: String(done), "aria-label": `Evidence that it is ${name}` }),
    element("span", { class: "figure" }, wealth >= needed ? "decided" : `×${digits(wealth)}`),
  ];
}

/**
 * @param {WinRate} rate
 * @returns {string} with the interval
 */
export function rateInWords({ rate, low, high }) {
  return rate === null ? "–" : `${percent(rate)} (${percent(low)} to ${percent(high)})`;
}
