/**
 * @file The dialog before a change: it names the version, says what will happen, asks why, and sends the change with the
 * generation that was on the screen. Going ahead without the gate's or the verdict's consent is offered once the server
 * has refused.
 */

import { Refused, Unreachable } from "./api.js";
import { byId, element } from "./element.js";
import { percent } from "./figures.js";
import { inWords } from "./problem.js";

/**
 * @typedef {import("./operator_release.js").Release} Release
 * @typedef {import("./operator_release.js").Verb} Verb
 * @typedef {import("./operator_tables.js").Version} Version
 */

const DEFAULT_SHARE = "10";
/** Every byte of a version is checked before it gets traffic. */
const PATIENCE_SECONDS = 120;

/** The dialog. */
export class Confirm {
  /** @type {HTMLDialogElement} */
  #dialog = byId("confirm");
  /** @type {HTMLSelectElement} */
  #version = byId("confirm-version");
  /** @type {HTMLInputElement} */
  #share = byId("confirm-share");
  /** @type {HTMLTextAreaElement} */
  #reason = byId("confirm-reason");
  /** @type {HTMLTextAreaElement} */
  #override = byId("confirm-override");
  #go = byId("confirm-go");
  #busy = false;
  #opened = 0;
  /** @type {Verb} */
  #verb = "rollback";
  /** @type {Release | null} as it was when the dialog was opened */
  #release = null;
  /** @type {readonly Version[]} */
  #versions = [];

  /**
   * @param {import("./api.js").Api} api
   * @param {object} listeners
   * @param {() => void} listeners.onDone
   * @param {() => void} listeners.onStale somebody else was quicker
   * @param {(refused: Refused) => void} listeners.onKeyNeeded
   */
  constructor(api, { onDone, onStale, onKeyNeeded }) {
    this.api = api;
    this.onDone = onDone;
    this.onStale = onStale;
    this.onKeyNeeded = onKeyNeeded;
    byId("confirm-close").addEventListener("click", () => this.close());
    byId("confirm-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#version.addEventListener("change", () => this.#begin());
    this.#share.addEventListener("input", () => this.#describe());
  }

  /**
   * @param {Verb} verb
   * @param {Release} release
   * @param {readonly Version[]} versions for a canary, those that may become it
   */
  open(verb, release, versions) {
    this.#opened += 1;
    this.#setBusy(false);
    this.#verb = verb;
    this.#release = release;
    this.#versions = versions;
    this.#share.value = DEFAULT_SHARE;
    this.#reason.value = "";
    byId("confirm-choice").hidden = verb !== "canary";
    this.#share.disabled = verb !== "canary"; // else it would be checked
    const options = verb === "canary" ? versions : [];
    this.#version.replaceChildren(
      ...options.map(({ version, gate }) =>
        element("option", { value: `${version}` }, `${version}, ${gate?.passed ? "passed its gate" : "not passed"}`),
      ),
    );
    this.#begin();
    this.#dialog.showModal();
    (verb === "canary" ? this.#version : this.#reason).focus();
  }

  /** What was sent goes on. */
  close() {
    this.#dialog.close();
  }

  /** @param {boolean} busy */
  #setBusy(busy) {
    this.#busy = busy;
    this.#go.ariaDisabled = String(busy);
  }

  /** Start anew: what was refused was for another version, or long ago. */
  #begin() {
    byId("confirm-problem").textContent = "";
    byId("override-field").hidden = true;
    byId("reason-field").hidden = false;
    this.#override.value = "";
    this.#override.required = false;
    this.#go.hidden = false;
    byId("confirm-close").textContent = "Cancel";
    this.#describe();
  }

  #describe() {
    const release = /** @type {Release} */ (this.#release);
    const { title, text, evidence, go } = this.#words(release);
    byId("confirm-title").textContent = title;
    byId("confirm-text").textContent = text;
    byId("confirm-evidence").textContent = evidence;
    this.#go.textContent = byId("override-field").hidden ? go : `Override: ${go.charAt(0).toLowerCase()}${go.slice(1)}`;
  }

  /** @param {Release} release */
  #words({ stable, canary, previous, verdict }) {
    if (this.#verb === "canary") {
      const chosen = this.#version.value;
      const share = percent(Number(this.#share.value) / 100);
      return {
        title: `Start canary ${chosen}?`,
        text: `Version ${chosen} will answer ${share} of the users and one side of every blind comparison; version ${stable} the rest.`,
        evidence: gateInWords(this.#versions.find(({ version }) => String(version) === chosen)),
        go: `Start canary ${chosen} at ${share}`,
      };
    }
    if (this.#verb === "promote") {
      return {
        title: `Promote version ${canary}?`,
        text: `Version ${canary} will be stable and serve everyone. Version ${stable} will be the previous one, to which a rollback returns.`,
        evidence: `The verdict: ${verdict?.said ?? "none"}.`,
        go: `Promote version ${canary}`,
      };
    }
    if (canary !== null) {
      return {
        title: `Drop canary ${canary}?`,
        text: `Version ${canary} will serve nobody any more; version ${stable} will serve everyone.`,
        evidence: `The verdict: ${verdict?.said ?? "none"}.`,
        go: `Drop canary ${canary}`,
      };
    }
    return {
      title: `Return to version ${previous}?`,
      text: `Version ${previous} will be stable and serve everyone; version ${stable} nobody any more. There will be no previous version.`,
      evidence: "",
      go: `Return to version ${previous}`,
    };
  }

  async #send() {
    if (this.#busy) return;
    const release = /** @type {Release} */ (this.#release);
    const options = { ifMatch: String(release.generation), timeoutSeconds: PATIENCE_SECONDS };
    const opened = this.#opened;
    this.#setBusy(true);
    byId("confirm-problem").textContent = "";
    try {
      await this.api.post(`/v1/release/${this.#verb}`, this.#body(), options);
      if (opened === this.#opened) this.close();
      this.onDone();
    } catch (error) {
      if (opened === this.#opened) this.#failed(error);
    } finally {
      if (opened === this.#opened) this.#setBusy(false);
    }
  }

  /** @returns {object} */
  #body() {
    const reason = this.#reason.value.trim();
    const override = this.#override.value.trim();
    return {
      reason,
      ...(this.#verb === "canary"
        ? { version: Number(this.#version.value), fraction: Number(this.#share.value) / 100 }
        : {}),
      ...(override ? { override } : {}),
    };
  }

  /** @param {unknown} error */
  #failed(error) {
    if (error instanceof Refused && error.needsKey) {
      this.onKeyNeeded(error);
      return;
    }
    if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
    let problem = inWords(error);
    if (error instanceof Refused && error.status === 409) problem = `The server refuses. ${problem}`;
    if (error instanceof Unreachable) problem += " Whether the change was made, the log will show. Trying again is safe.";
    if (error instanceof Refused && error.status === 412) {
      problem = `Somebody else changed the release meanwhile; nothing was done. ${problem} Close this and look again.`;
      this.#go.hidden = true;
      byId("confirm-close").textContent = "Close";
      byId("confirm-close").focus();
      this.onStale();
    }
    byId("confirm-problem").textContent = problem;
    if (error instanceof Refused && error.status === 409 && this.#consentIsMissing) this.#offerOverride();
  }

  /** Whether it may be the gate or the verdict that refuses: nothing else can be overridden. */
  get #consentIsMissing() {
    if (this.#verb === "promote") return true;
    const chosen = this.#versions.find(({ version }) => String(version) === this.#version.value);
    return this.#verb === "canary" && !chosen?.gate?.passed;
  }

  #offerOverride() {
    byId("override-field").hidden = false;
    this.#override.required = true;
    this.#describe();
    this.#override.focus();
  }
}

/** @param {Version | undefined} version */
function gateInWords(version) {
  const gate = version?.gate ?? null;
  if (version?.problem) return version.problem;
  if (gate === null) return "It was never measured by a gate.";
  const failed = gate.checks.filter(({ passed }) => !passed).map(({ sentence }) => sentence);
  return gate.passed ? "It passed its gate." : `It did not pass its gate: ${failed.join("; ")}.`;
}
