/** @file Requests to this server: one error class for what it refuses, one for when it cannot be reached. */

import { streamedEvents } from "./stream.js";

/** The server answered with an error. */
export class Refused extends Error {
  /**
   * @param {string} message the server's own words
   * @param {number} status
   * @param {number} [retryAfterSeconds]
   */
  constructor(message, status, retryAfterSeconds) {
    super(message);
    this.status = status;
    this.retryAfterSeconds = retryAfterSeconds;
  }

  /** Whether another key may do what this one may not. */
  get needsKey() {
    return this.status === 401 || this.status === 403;
  }

  /** Whether the same request may succeed later. */
  get passes() {
    return [408, 409, 429].includes(this.status) || this.status >= 500;
  }
}

/** No answer came. The server may or may not have done what was asked. */
export class Unreachable extends Error {}

/**
 * @typedef {object} Options
 * @property {string} [idempotencyKey]
 * @property {string} [ifMatch] what the request was decided on
 * @property {AbortSignal} [signal]
 * @property {number} [timeoutSeconds]
 */

/** This server, asked with the key that was typed in: it lives in this object only. */
export class Api {
  #key = "";

  /** @param {string} key the empty text where the server needs none */
  signIn(key) {
    this.#key = key;
  }

  /**
   * @param {string} path
   * @returns {Promise<any>} Throws Refused or Unreachable.
   */
  async get(path) {
    return (await this.#ask("GET", path, undefined, { timeoutSeconds: 15 })).json();
  }

  /**
   * @param {string} path
   * @returns {Promise<Blob>} Throws Refused or Unreachable.
   */
  async blob(path) {
    return (await this.#ask("GET", path, undefined, { timeoutSeconds: 60 })).blob();
  }

  /**
   * @param {string} path
   * @param {object} body
   * @param {Options} [options]
   * @returns {Promise<any>} Throws Refused or Unreachable.
   */
  async post(path, body, options) {
    const answer = await this.#ask("POST", path, body, options);
    try {
      return await answer.json();
    } catch (error) {
      throw new Unreachable("the answer broke off", { cause: error });
    }
  }

  /**
   * @param {string} path
   * @param {object} body
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<any>} the events of a streamed answer. Throws Refused or Unreachable.
   */
  async *stream(path, body, signal) {
    const answer = await this.#ask("POST", path, body, { signal });
    try {
      for await (const event of streamedEvents(/** @type {ReadableStream} */ (answer.body))) {
        if (event.error) throw new Refused(event.error.message, 500);
        yield event;
      }
    } catch (error) {
      if (signal.aborted || error instanceof Refused) throw error;
      throw new Unreachable("the answer broke off", { cause: error });
    }
  }

  /**
   * @param {string} method
   * @param {string} path
   * @param {object} [body]
   * @param {Options} [options]
   * @returns {Promise<Response>}
   */
  async #ask(method, path, body, { idempotencyKey, ifMatch, signal, timeoutSeconds } = {}) {
    const headers = new Headers({ "Content-Type": "application/json" });
    if (this.#key) headers.set("Authorization", `Bearer ${this.#key}`);
    if (idempotencyKey) headers.set("Idempotency-Key", idempotencyKey);
    if (ifMatch) headers.set("If-Match", ifMatch);
    /** @type {Response} */
    let answer;
    try {
      answer = await fetch(path, {
        method,
        headers,
        body: body && JSON.stringify(body),
        signal: signal ?? (timeoutSeconds ? AbortSignal.timeout(timeoutSeconds * 1000) : undefined),
        credentials: "omit",
        cache: "no-store",
        redirect: "error",
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Unreachable("the server does not answer", { cause: error });
    }
    if (!answer.ok) throw await refusal(answer);
    return answer;
  }
}

/**
 * @param {Response} answer
 * @returns {Promise<Refused>}
 */
async function refusal(answer) {
  let message = `the server answered with status ${answer.status}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // A proxy's page, not the server's words.
  }
  return new Refused(message, answer.status, Number(answer.headers.get("Retry-After")) || undefined);
}
