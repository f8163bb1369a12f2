/** @file The answers side by side, each with its number, where it stands, and a form to rate it. */

import { element } from "./element.js";
import { groupOf, ordinal, standing } from "./ranking.js";
import { fillRating, ratingForm } from "./rating_form.js";

/**
 * @typedef {import("./ranking.js").Ranking} Ranking
 * @typedef {import("./rating_form.js").Rating} Rating
 */

/** The cards of one piece of work. All answers look alike: nothing but the text differs. */
export class AnswerCards {
  #root;
  #onPick;
  #onRate;

  /**
   * @param {HTMLElement} root
   * @param {object} listeners
   * @param {(candidate: number) => void} listeners.onPick the number was pressed
   * @param {(candidate: number, rating: Rating | null) => void} listeners.onRate
   */
  constructor(root, { onPick, onRate }) {
    this.#root = root;
    this.#onPick = onPick;
    this.#onRate = onRate;
  }

  /**
   * @param {number} count
   * @param {boolean} waiting whether they are blank until their texts are set
   */
  show(count, waiting) {
    this.#root.dataset.count = String(count);
    this.#root.ariaBusy = String(waiting);
    this.#root.replaceChildren(...Array.from({ length: count }, (_, candidate) => this.#card(candidate, waiting)));
  }

  /** @param {readonly string[]} texts */
  setTexts(texts) {
    this.#root.querySelectorAll(".text").forEach((text, candidate) => {
      text.textContent = texts[candidate];
    });
  }

  /** @param {Ranking} ranking */
  setRanking(ranking) {
    for (const [candidate, card] of [...this.#root.children].entries()) {
      const [number, place] = card.querySelectorAll(".number, .place");
      const at = groupOf(ranking, candidate);
      card.classList.toggle("ranked", at >= 0);
      number.ariaLabel = `Answer ${candidate + 1}, ${standing(ranking, candidate)}`;
      place.textContent = at < 0 ? "" : ranking.allBad ? "bad" : ordinal(at);
      if (at >= 0 && !ranking.allBad && ranking.groups[at].length > 1) place.textContent += " tied";
    }
  }

  /** @param {readonly (Rating | null)[]} ratings */
  setRatings(ratings) {
    this.#root.querySelectorAll(".rating").forEach((form, candidate) => fillRating(form, ratings[candidate]));
  }

  /** @param {number} candidate */
  askForOverall(candidate) {
    const form = this.#root.querySelectorAll(".rating")[candidate];
    form.querySelector("input")?.focus();
  }

  /**
   * @param {number} candidate
   * @param {boolean} waiting
   * @returns {HTMLElement}
   */
  #card(candidate, waiting) {
    const number = element(
      "button",
      {
        type: "button",
        class: "number",
        "data-drag": `${candidate}`,
        "aria-label": `Answer ${candidate + 1}`,
        "aria-keyshortcuts": `${candidate + 1}`,
        disabled: waiting,
        click: () => this.#onPick(candidate),
      },
      `${candidate + 1}`,
    );
    const rating = ratingForm(candidate, (given) => this.#onRate(candidate, given));
    return element(
      "article",
      { class: waiting ? "answer waiting" : "answer", "aria-label": `Answer ${candidate + 1}` },
      element("header", {}, number, element("span", { class: "place", "aria-hidden": "true" })),
      element("div", { class: "text", dir: "auto" }),
      ...(waiting ? [] : [rating]),
    );
  }
}
