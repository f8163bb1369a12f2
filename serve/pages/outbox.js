/**
 * @file Judgements on their way to the server. Each is kept on this device until the server has acknowledged it, and is
 * sent again with the same idempotency key as often as it takes: none is lost, none counts twice.
 *
 * @typedef {object} Entry
 * @property {string} key the idempotency key
 * @property {string} path
 * @property {object} body
 * @property {string} what in words
 * @property {{position: number, rating: object}[]} [ratings] to be sent once the comparison's answer names the candidates
 * @property {number} [queued] unix milliseconds
 * @property {string} [problem] why the server will not take it; it waits for the person's decision
 */

import { Refused } from "./api.js";
import { forget, recall, remember, remembered } from "./device.js";

const PREFIX = "outbox.";
const TIMEOUT_SECONDS = 15;
const FIRST_RETRY_SECONDS = 1;
const LONGEST_RETRY_SECONDS = 30;

/** Every entry is its own item of local storage, so that two open pages cannot overwrite each other's. */
export class Outbox {
  #api;
  #onChange;
  #onAcknowledged;
  #onKeyNeeded;
  /** @type {Map<string, Entry>} entries that the browser would not remember */
  #unkept = new Map();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #retry;
  #retrySeconds = FIRST_RETRY_SECONDS;
  #sending = false;

  /**
   * @param {import("./api.js").Api} api
   * @param {object} listeners
   * @param {() => void} listeners.onChange something was added, sent or refused
   * @param {(entry: Entry) => void} listeners.onAcknowledged the server has it on disk
   * @param {(refused: Refused) => void} listeners.onKeyNeeded sending waits for `send` after another sign-in
   */
  constructor(api, { onChange, onAcknowledged, onKeyNeeded }) {
    this.#api = api;
    this.#onChange = onChange;
    this.#onAcknowledged = onAcknowledged;
    this.#onKeyNeeded = onKeyNeeded;
    addEventListener("online", () => this.send());
    addEventListener("storage", onChange);
  }

  /** @returns {Entry[]} all that is not acknowledged, oldest first */
  get entries() {
    const kept = remembered(PREFIX).map((name) => /** @type {Entry | null} */ (recall(name)));
    const all = [...kept.filter((entry) => entry !== null), ...this.#unkept.values()];
    return all.sort((a, b) => Number(a.queued) - Number(b.queued));
  }

  /** Whether what waits would survive a reload. */
  get durable() {
    return this.#unkept.size === 0;
  }

  /** @param {Entry[]} entries */
  put(entries) {
    for (const entry of entries) this.#keep({ queued: Date.now(), ...entry });
    this.send();
  }

  /** @param {string} key */
  discard(key) {
    this.#remove(key);
    this.#onChange();
  }

  /** Also offer again what was refused. */
  retryAll() {
    for (const { problem, ...entry } of this.entries) if (problem) this.#keep(entry);
    this.send();
  }

  /** Send what waits, now; what fails for now is sent again by itself. */
  async send() {
    this.#onChange();
    if (this.#sending) return;
    this.#sending = true;
    clearTimeout(this.#retry);
    try {
      for (let entry = this.#next(); entry; entry = this.#next()) {
        await this.#deliver(entry);
        this.#retrySeconds = FIRST_RETRY_SECONDS;
        this.#onChange();
      }
    } catch (error) {
      this.#pause(error);
    } finally {
      this.#sending = false;
    }
  }

  /** @returns {Entry | undefined} */
  #next() {
    return this.entries.find((entry) => !entry.problem);
  }

  /** @param {Entry} entry Throws what is no fault of the entry's. */
  async #deliver(entry) {
    try {
      const options = { idempotencyKey: entry.key, timeoutSeconds: TIMEOUT_SECONDS };
      const answer = await this.#api.post(entry.path, entry.body, options);
      // Ratings first: if the page ends in between, the comparison is sent again and they get the same keys.
      for (const rating of entry.ratings ?? []) {
        // What no policy sampled cannot be rated, and the answer is the first to tell.
        if (answer.candidates[rating.position].completion_id) this.#keep(ratingEntry(entry, rating, answer));
      }
      this.#remove(entry.key);
      this.#onAcknowledged(entry);
    } catch (error) {
      if (!(error instanceof Refused) || error.passes || error.needsKey) throw error;
      this.#keep({ ...entry, problem: error.message });
    }
  }

  /** @param {unknown} error */
  #pause(error) {
    if (error instanceof Refused && error.needsKey) {
      this.#onKeyNeeded(error);
      return;
    }
    const seconds = Math.max(this.#retrySeconds, (error instanceof Refused && error.retryAfterSeconds) || 0);
    this.#retrySeconds = Math.min(2 * this.#retrySeconds, LONGEST_RETRY_SECONDS);
    this.#retry = setTimeout(() => this.send(), seconds * 1000);
  }

  /** @param {Entry} entry */
  #keep(entry) {
    if (remember(PREFIX + entry.key, entry)) this.#unkept.delete(entry.key);
    else this.#unkept.set(entry.key, entry);
  }

  /** @param {string} key */
  #remove(key) {
    forget(PREFIX + key);
    this.#unkept.delete(key);
  }
}

/**
 * @param {Entry} entry a comparison's
 * @param {{position: number, rating: object}} rated
 * @param {{candidates: {completion_id: string, index: number}[], labeler: string}} answer the server's, which names the
 *     candidates by completion
 * @returns {Entry}
 */
function ratingEntry(entry, { position, rating }, { candidates, labeler }) {
  const { completion_id, index } = candidates[position];
  return {
    key: `${entry.key}-rating-${position}`,
    path: "/v1/feedback/ratings",
    body: { completion_id, index, ...rating, labeler },
    what: `your rating of answer ${position + 1}`,
    queued: entry.queued,
  };
}
