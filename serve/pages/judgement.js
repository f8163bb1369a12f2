/**
 * @file What a person says of one piece of work: the ranking with its history, ratings, a comment, an answer of their
 * own. It survives a reload, and ends as entries of the outbox.
 */

import { forget, recall, remember } from "./device.js";
import { judgementOf, unranked } from "./ranking.js";
import { Stopwatch } from "./stopwatch.js";

/**
 * @typedef {import("./ranking.js").Ranking} Ranking
 * @typedef {import("./tasks.js").Work} Work
 * @typedef {import("./rating_form.js").Rating} Rating
 * @typedef {import("./outbox.js").Entry} Entry
 */

const MAX_UNDO = 50;

/** A judgement in the making. */
export class Judgement {
  /** @type {Ranking[]} */
  #history = [];
  /** @type {(Rating | null)[]} by candidate */
  ratings;
  comment = "";
  demonstration = "";

  /**
   * @param {Work} work
   * @param {string} draft the name it is remembered by until it is submitted
   */
  constructor(work, draft) {
    this.work = work;
    this.draft = draft;
    this.ranking = unranked(work.candidates.length);
    this.ratings = work.candidates.map(() => null);
    this.stopwatch = new Stopwatch();
  }

  /**
   * @param {string} draft
   * @param {string | null} labeler
   * @returns {Judgement | null} the one that was remembered, if it is this labeler's and the server still knows the work
   */
  static resume(draft, labeler) {
    const saved = recall(draft);
    if (saved === null || saved.work.labeler !== labeler) return null;
    if (saved.work.expires !== null && saved.work.expires * 1000 < Date.now()) return null;
    const resumed = new Judgement(saved.work, draft);
    resumed.ranking = saved.ranking;
    resumed.#history = saved.history;
    resumed.ratings = saved.ratings;
    resumed.comment = saved.comment;
    resumed.demonstration = saved.demonstration;
    resumed.stopwatch = new Stopwatch(saved.elapsedMs);
    return resumed;
  }

  /** Remember all of it. */
  save() {
    const { work, ranking, ratings, comment, demonstration } = this;
    const { elapsedMs } = this.stopwatch;
    remember(this.draft, { work, ranking, history: this.#history, ratings, comment, demonstration, elapsedMs });
  }

  /** Remember nothing of it. */
  discard() {
    forget(this.draft);
  }

  /** @param {Ranking} ranking */
  rank(ranking) {
    if (ranking === this.ranking) return;
    this.#history = [...this.#history, this.ranking].slice(-MAX_UNDO);
    this.ranking = ranking;
    this.save();
  }

  get canUndo() {
    return this.#history.length > 0;
  }

  /** Take the last step of the ranking back. */
  undo() {
    this.ranking = this.#history.pop() ?? this.ranking;
    this.save();
  }

  /** @returns {number} the first candidate that has flags but no overall rating; -1 where there is none */
  get halfRated() {
    return this.ratings.findIndex((rating) => rating !== null && rating.overall === null);
  }

  /** @returns {Entry[]} what is to be sent, once the ranking is complete */
  entries() {
    const { source, asked, key, labeler } = this.work;
    const judged = labeler === null ? {} : { labeler };
    const comment = this.comment.trim() ? { comment: this.comment } : {};
    const compared = { ...source, ...judgementOf(this.ranking), ...judged, ...comment };
    const ratings = this.ratings.flatMap((rating, position) => (rating ? [{ position, rating }] : []));
    /** @type {Entry[]} */
    const entries = [
      {
        key,
        path: "/v1/feedback/comparisons",
        body: { ...compared, duration_ms: this.stopwatch.elapsedMs },
        what: `your ranking of ${this.ranking.count} answers`,
        ratings,
      },
    ];
    if (this.demonstration.trim()) {
      entries.push({
        key: `${key}-demonstration`,
        path: "/v1/feedback/demonstrations",
        body: { ...asked, completion: this.demonstration, ...judged },
        what: "your own answer",
      });
    }
    return entries;
  }
}
