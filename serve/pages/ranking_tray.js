/** @file The ranking so far, at the bottom of the window, with everything that can be done to it. */

import { element } from "./element.js";
import { groupOf, isComplete, ordinal, rankedCount, standing } from "./ranking.js";

/** @typedef {import("./ranking.js").Ranking} Ranking */

/**
 * What a person can do.
 *
 * @typedef {object} Actions
 * @property {(candidate: number) => void} place
 * @property {(candidate: number) => void} takeOut
 * @property {(candidate: number, direction: -1 | 1) => void} shift
 * @property {() => void} tie
 * @property {() => void} allBad
 * @property {() => void} undo
 * @property {() => void} submit
 */

/** @type {Record<string, -1 | 1>} */
const ARROWS = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };

/** Draws the tray anew at each step, and keeps the focus where it was. */
export class RankingTray {
  #root;
  #actions;

  /**
   * @param {HTMLElement} root
   * @param {Actions} actions
   */
  constructor(root, actions) {
    this.#root = root;
    this.#actions = actions;
  }

  /**
   * @param {Ranking} ranking
   * @param {boolean} canUndo
   */
  show(ranking, canUndo) {
    const focused = this.#focusedName();
    const choice = ranking.count === 2 ? this.#quickChoice(ranking) : this.#ranks(ranking);
    this.#root.replaceChildren(choice, this.#buttons(ranking, canUndo));
    this.#root.hidden = false;
    /** @type {HTMLElement | null} */
    const again = this.#root.querySelector(`[data-name="${focused}"]:not(:disabled)`);
    again?.focus();
  }

  /** @param {() => void} stop what ends the wait for streaming answers */
  showStop(stop) {
    this.#root.replaceChildren(
      element("p", { class: "state" }, "The answers are being written …"),
      element("div", { class: "buttons" }, element("button", { type: "button", click: stop }, "Stop")),
    );
    this.#root.hidden = false;
  }

  /** @param {string} problem stands where the progress stood, until the next step */
  say(problem) {
    const state = this.#root.querySelector(".state");
    if (state === null) return;
    state.textContent = problem;
    state.classList.add("problem");
  }

  hide() {
    this.#root.hidden = true;
  }

  /** @returns {string | undefined} */
  #focusedName() {
    const { activeElement } = document;
    return activeElement instanceof HTMLElement && this.#root.contains(activeElement) ? activeElement.dataset.name : undefined;
  }

  /**
   * Two candidates: one press decides.
   *
   * @param {Ranking} ranking
   * @returns {HTMLElement}
   */
  #quickChoice({ groups, allBad }) {
    const tied = groups.length === 1;
    /** @type {[string, string, boolean, () => void][]} */
    const choices = [
      ["1", "Answer 1 is better", groups.length === 2 && groups[0][0] === 0, () => this.#actions.place(0)],
      ["=", "Tie", tied && !allBad, this.#actions.tie],
      ["2", "Answer 2 is better", groups.length === 2 && groups[0][0] === 1, () => this.#actions.place(1)],
      ["0", "Both bad", allBad, this.#actions.allBad],
    ];
    return element(
      "div",
      { class: "quick", role: "group", "aria-label": "Which answer is better" },
      ...choices.map(([key, words, pressed, click]) =>
        this.#button(key, words, { "aria-pressed": String(pressed), click }),
      ),
    );
  }

  /**
   * @param {Ranking} ranking
   * @returns {HTMLElement}
   */
  #ranks(ranking) {
    const left = Array.from({ length: ranking.count }, (_, candidate) => candidate).filter(
      (candidate) => groupOf(ranking, candidate) < 0,
    );
    const last = ranking.groups.length - 1;
    const steps = ranking.groups.flatMap((group, at) => [
      gap(at),
      element(
        "li",
        { class: ranking.tieNext && at === last ? "rank open" : "rank", "data-drop": `group:${at}` },
        element("span", { class: "label" }, ranking.allBad ? "All bad" : ordinal(at)),
        ...group.map((candidate) => this.#chip(ranking, candidate)),
      ),
    ]);
    const hint = ranking.groups.length === 0 ? "Press the numbers in order, best first, or drag them here" : "";
    return element(
      "div",
      { class: "ranks" },
      element(
        "div",
        { class: "left", "data-drop": "left", role: "group", "aria-label": "Not ranked yet" },
        ...left.map((candidate) => this.#chip(ranking, candidate)),
      ),
      element("ol", { class: "order", "aria-label": "Ranks, best first" }, ...steps, gap(last + 1, hint)),
    );
  }

  /**
   * @param {Ranking} ranking
   * @param {number} candidate
   * @returns {HTMLElement}
   */
  #chip(ranking, candidate) {
    return element(
      "button",
      {
        type: "button",
        class: "chip",
        "data-drag": `${candidate}`,
        "data-name": `chip-${candidate}`,
        "aria-label": `Answer ${candidate + 1}, ${standing(ranking, candidate)}`,
        click: () => this.#actions.place(candidate),
        keydown: (event) => this.#chipKey(/** @type {KeyboardEvent} */ (event), candidate),
      },
      `${candidate + 1}`,
    );
  }

  /**
   * @param {KeyboardEvent} event
   * @param {number} candidate
   */
  #chipKey(event, candidate) {
    if (event.key in ARROWS) this.#actions.shift(candidate, ARROWS[event.key]);
    else if (event.key === "Delete" || event.key === "Backspace") this.#actions.takeOut(candidate);
    else return;
    event.preventDefault();
  }

  /**
   * @param {Ranking} ranking
   * @param {boolean} canUndo
   * @returns {HTMLElement}
   */
  #buttons(ranking, canUndo) {
    const complete = isComplete(ranking);
    const { tieNext, count, allBad, groups } = ranking;
    const progress = element("p", { class: "state" }, progressOf(ranking));
    const undo = this.#button("z", "Undo", { disabled: !canUndo, click: this.#actions.undo });
    const submit = this.#button("Enter", "Submit", { class: "primary", click: this.#actions.submit });
    submit.ariaDisabled = String(!complete); // it stays focusable, and says what is missing
    if (count === 2) return element("div", { class: "buttons" }, progress, undo, submit);
    const tie = this.#button("=", "Tie", {
      "aria-pressed": String(tieNext),
      disabled: groups.length === 0 || complete,
      click: this.#actions.tie,
    });
    const bad = this.#button("0", "All bad", { "aria-pressed": String(allBad), click: this.#actions.allBad });
    return element("div", { class: "buttons" }, progress, tie, bad, undo, submit);
  }

  /**
   * @param {string} key
   * @param {string} words
   * @param {Record<string, string | boolean | EventListener>} properties
   * @returns {HTMLElement}
   */
  #button(key, words, properties) {
    const shown = element("kbd", { "aria-hidden": "true" }, key === "Enter" ? "⏎" : key);
    return element("button", { type: "button", "data-name": words, "aria-keyshortcuts": key, ...properties }, shown, words);
  }
}

/**
 * @param {number} at how many groups are better than one made here
 * @param {string} [hint]
 * @returns {HTMLElement}
 */
function gap(at, hint = "") {
  return element("li", { class: hint ? "gap hint" : "gap", "data-drop": `gap:${at}`, "aria-hidden": String(!hint) }, hint);
}

/**
 * @param {Ranking} ranking
 * @returns {string}
 */
function progressOf(ranking) {
  if (ranking.tieNext) return "Tied with …";
  if (isComplete(ranking)) return "Ready";
  return ranking.count === 2 ? "" : `${rankedCount(ranking)} of ${ranking.count} ranked`;
}
