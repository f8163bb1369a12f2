/**
 * @file The operator's page: looks at the release every two seconds while it can be seen, shows what changed, and hands
 * the buttons to the dialog. This file joins the parts; each part knows one thing.
 */

import { announce } from "./announcer.js";
import { Api, Refused, Unreachable } from "./api.js";
import { byId, element } from "./element.js";
import { count, time } from "./figures.js";
import { Confirm } from "./operator_confirm.js";
import { Plot } from "./operator_plots.js";
import { inSentence, movesOf, showMoves, showRelease } from "./operator_release.js";
import { showGate, showLog, showServers, showVersions } from "./operator_tables.js";
import { rateInWords, showVerdict } from "./operator_verdict.js";
import { inWords } from "./problem.js";
import { SignIn } from "./sign_in.js";

/**
 * @typedef {import("./operator_release.js").Release} Release
 * @typedef {import("./operator_release.js").Verb} Verb
 * @typedef {import("./operator_tables.js").Version} Version
 * @typedef {import("./operator_verdict.js").WinRate} WinRate
 */

const LOOK_SECONDS = 2;
/** Win rates read the whole log, and plots are drawn: for a person to look at, this is often enough. */
const WIN_RATE_SECONDS = 10;
const CERTAIN = "where it surely is, however often one looks";

/** Joins server and screen. */
class OperatorPage {
  #api = new Api();
  #signIn = new SignIn((key) => this.#signedIn(key));
  #confirm = new Confirm(this.#api, {
    onDone: () => this.#look(),
    onStale: () => this.#look(),
    onKeyNeeded: (refused) => this.#askForKey(refused),
  });
  #course = new Plot(byId("course"), "/v1/release/plots/canary.svg", this.#api);
  #released = new Plot(byId("released"), "/v1/release/plots/released.svg", this.#api);
  /** @type {HTMLSelectElement} */
  #gateOf = byId("gate-version");
  #hasKey = false;
  #timer = 0;
  #looking = false;
  #lookAgain = false;
  /** @type {Release | null} */
  #release = null;
  /** @type {Version[]} */
  #versions = [];
  /** @type {WinRate[]} */
  #winRates = [];
  #alpha = 0.05;
  #winRatesOf = -1;
  #winRatesAt = -Infinity;
  #answeredAt = 0;
  /** @type {Map<string, string>} what each part of the page shows, as JSON */
  #shown = new Map();

  constructor() {
    for (const verb of /** @type {Verb[]} */ (["canary", "promote", "rollback"])) {
      byId(`move-${verb}`).addEventListener("click", () => this.#ask(verb));
    }
    this.#gateOf.addEventListener("change", () => this.#showGate());
    document.addEventListener("visibilitychange", () => this.#look());
  }

  /** Look now, and from then on. */
  start() {
    this.#look();
  }

  /** Look once, and again in a while; nothing is asked for while nobody sees the page. */
  async #look() {
    clearTimeout(this.#timer);
    if (document.hidden || !byId("sign-in").hidden) return;
    this.#lookAgain = this.#looking;
    if (this.#looking) return;
    this.#looking = true;
    try {
      await this.#update();
      this.#connected();
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
      if (error instanceof Refused && error.needsKey) this.#askForKey(error);
      else this.#disconnected(error);
    } finally {
      this.#looking = false;
      this.#timer = setTimeout(() => this.#look(), this.#lookAgain ? 0 : LOOK_SECONDS * 1000);
    }
  }

  async #update() {
    const [release, versions, history] = await Promise.all([
      this.#api.get("/v1/release"),
      this.#api.get("/v1/release/versions"),
      this.#api.get("/v1/release/history?count=50"),
    ]);
    const before = this.#release;
    const entered = byId("board").hidden;
    this.#release = release;
    this.#versions = versions.data;
    byId("board").hidden = false;
    this.#show("release", { ...release, replicas: null, verdict: null }, () => showRelease(release));
    this.#show("verdict", [release.canary, release.stable, release.verdict], () =>
      showVerdict(byId("verdict"), release),
    );
    this.#show("servers", release.replicas, () => showServers(byId("servers"), release.replicas));
    this.#show("log", history.data, () => showLog(byId("log"), history.data));
    this.#show("gates", this.#versions.map(({ version, gate }) => [version, gate]), () => this.#offerGates());
    this.#showVersions();
    if (entered) byId("release-title").focus();
    else if (before?.generation !== release.generation) announce(inSentence(release));
    const waited = performance.now() - this.#winRatesAt >= WIN_RATE_SECONDS * 1000;
    if (waited || this.#winRatesOf !== release.generation) this.#updateWinRates(release); // may take long: not awaited
  }

  /** @param {Release} release */
  async #updateWinRates(release) {
    this.#winRatesOf = release.generation;
    this.#winRatesAt = performance.now();
    try {
      ({ data: this.#winRates, alpha: this.#alpha } = await this.#api.get("/v1/release/win-rates"));
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
      return; // the next look tells what is wrong
    }
    this.#showVersions();
    const canary = this.#winRates.find(({ version }) => version === release.canary);
    if (release.canary === null || canary === undefined) this.#course.hide("There is no canary.");
    else this.#course.show(canaryInWords(canary), `Line: win rate. Area: ${CERTAIN}.`);
    if (this.#winRates.length === 0) this.#released.hide("No released version was compared with the one before yet.");
    else {
      const told = this.#winRates.map((one) => `${one.version} over ${one.over}: ${rateInWords(one)}`).join("; ");
      this.#released.show(`Version ${told}.`, `Point: win rate. Bar: ${CERTAIN}.`);
    }
  }

  /**
   * Show a part of the page anew only where it changed, so that nobody loses their place in it.
   *
   * @param {string} part
   * @param {unknown} told
   * @param {() => void} show
   */
  #show(part, told, show) {
    const json = JSON.stringify(told);
    if (this.#shown.get(part) === json) return;
    this.#shown.set(part, json);
    show();
  }

  #showVersions() {
    this.#show("versions", [this.#versions, this.#winRates], () =>
      showVersions(byId("versions"), this.#versions, this.#winRates, this.#alpha),
    );
  }

  #offerGates() {
    const chosen = this.#gateOf.value;
    this.#gateOf.replaceChildren(
      ...this.#versions.map(({ version }) => element("option", { value: `${version}` }, `${version}`)),
    );
    const known = this.#versions.some(({ version }) => String(version) === chosen);
    this.#gateOf.value = known ? chosen : String(this.#release?.canary ?? this.#versions[0]?.version ?? "");
    this.#showGate();
  }

  #showGate() {
    showGate(byId("gate"), this.#versions.find(({ version }) => String(version) === this.#gateOf.value));
  }

  get #candidates() {
    return this.#versions.filter(({ version, problem }) => version !== this.#release?.stable && problem === null);
  }

  #showMoves(/** @type {boolean} */ connected) {
    if (this.#release === null) return;
    showMoves(movesOf(this.#release, this.#candidates.map(({ version }) => version)), connected);
  }

  /** @param {Verb} verb */
  #ask(verb) {
    if (this.#release === null || byId(`move-${verb}`).ariaDisabled === "true") return;
    this.#confirm.open(verb, this.#release, this.#candidates);
  }

  #connected() {
    this.#answeredAt = Date.now() / 1000;
    byId("lost").hidden = true;
    byId("connection").hidden = false;
    byId("connection").textContent = `Live, ${time(this.#answeredAt)}`;
    this.#showMoves(true);
  }

  /** @param {Refused | Unreachable} error */
  #disconnected(error) {
    const since = this.#answeredAt ? ` What is shown is as of ${time(this.#answeredAt)}.` : "";
    const told = `${inWords(error)}${since} The page keeps trying.`;
    if (byId("lost").textContent !== told) byId("lost").replaceChildren(element("p", {}, told));
    byId("lost").hidden = false;
    byId("connection").hidden = true;
    this.#showMoves(false);
  }

  /** @param {Refused} refused */
  #askForKey(refused) {
    this.#confirm.close();
    for (const part of ["board", "lost", "connection"]) byId(part).hidden = true;
    byId("sign-in").hidden = false;
    this.#signIn.ask(true, this.#hasKey || refused.status === 403 ? inWords(refused) : "");
  }

  /** @param {string | null} key */
  #signedIn(key) {
    this.#hasKey = true;
    this.#api.signIn(key ?? "");
    byId("sign-in").hidden = true;
    this.#look();
  }
}

/** @param {WinRate} canary */
function canaryInWords(canary) {
  const { version, over, wins, losses } = canary;
  if (wins + losses === 0) return `Version ${version} was not compared with version ${over} yet.`;
  const seen = `in ${count(wins)} of ${count(wins + losses)} comparisons without a tie`;
  return `Version ${version} was preferred to version ${over} ${seen}: ${rateInWords(canary)}.`;
}

new OperatorPage().start();
