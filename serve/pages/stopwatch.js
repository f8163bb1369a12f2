/** @file Measures how long a judgement took, while the page was in view. */

/** Runs while the page is visible. */
export class Stopwatch {
  #before;
  #since = document.hidden ? null : performance.now();

  /** @param {number} elapsedMs what was measured before a reload */
  constructor(elapsedMs = 0) {
    this.#before = elapsedMs;
  }

  /** To be called when the page comes into view or goes out of it. */
  visibilityChanged() {
    this.#before = this.elapsedMs;
    this.#since = document.hidden ? null : performance.now();
  }

  /** @returns {number} whole milliseconds */
  get elapsedMs() {
    return Math.round(this.#before + (this.#since === null ? 0 : performance.now() - this.#since));
  }
}
