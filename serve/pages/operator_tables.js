/** @file Versions, a version's gate, servers and the log, as tables. */

import { element } from "./element.js";
import { count, day, digits, percent, shareOf, time } from "./figures.js";
import { rateInWords } from "./operator_verdict.js";
import { table } from "./table.js";

/**
 * @typedef {import("./operator_verdict.js").WinRate} WinRate
 *
 * @typedef {object} Traffic
 * @property {number} requests
 * @property {number} errors
 * @property {number} timed
 * @property {number} completions
 * @property {number} unfinished
 * @property {number} unrecorded
 * @property {number | null} first_token_p50 seconds
 * @property {number | null} first_token_p95 seconds
 *
 * @typedef {object} GateFigure
 * @property {string} name
 * @property {number | string | null} value
 * @property {string} sentence
 *
 * @typedef {GateFigure & {passed: boolean, limit: number | string}} GateCheck
 *
 * @typedef {object} Version as `GET /v1/release/versions` tells it
 * @property {number} version
 * @property {"stable" | "canary" | "previous" | null} role
 * @property {Traffic | null} traffic
 * @property {string | null} problem
 * @property {string | null} created
 * @property {number | null} parent
 * @property {number | null} comparisons
 * @property {{passed: boolean, checks: GateCheck[], reported: GateFigure[]} | null} gate
 *
 * @typedef {object} Replica
 * @property {string} replica
 * @property {number} generation
 * @property {number[]} live
 * @property {number[]} loading
 * @property {Record<string, string>} failed
 * @property {string} detail
 * @property {boolean} converged
 *
 * @typedef {object} Attempt
 * @property {string} verb
 * @property {string} by
 * @property {string} reason
 * @property {string} outcome "accepted", or why not
 * @property {number} created unix seconds
 * @property {number | null} [stable]
 * @property {number | null} [canary]
 * @property {number | null} [canary_fraction]
 * @property {number | null} [version]
 * @property {string | null} [kind]
 */

const VERSION_COLUMNS = [
  "Version",
  "Made",
  "Gate",
  "Win rate",
  "Requests",
  "Failed",
  "First token",
  "Unfinished",
  "Unrecorded",
];

/**
 * @param {HTMLElement} root
 * @param {readonly Version[]} versions
 * @param {readonly WinRate[]} winRates
 * @param {number} alpha chance that a bound of a win rate is wrong
 */
export function showVersions(root, versions, winRates, alpha) {
  const rows = versions.map((one) => [
    element("span", { class: "name" }, `${one.version} `, ...(one.role ? [chip(one.role, one.role)] : [])),
    one.problem === null ? origin(one) : element("span", { class: "problem" }, one.problem),
    one.problem === null ? chip(...gateInWords(one)) : "–",
    winRate(one.version, winRates),
    ...traffic(one.traffic),
  ]);
  root.replaceChildren(
    table("Versions", VERSION_COLUMNS, rows, "There is no version yet."),
    element(
      "p",
      { class: "soft" },
      "Traffic is counted on all servers since the release last changed. Win rates leave out ties; each end of an " +
        `interval is ${percent(1 - alpha)} certain, however often one looks.`,
    ),
  );
}

/** @param {Version} version */
function origin({ created, parent, comparisons }) {
  const from = parent === null ? "" : `from ${parent}`;
  const learnt = comparisons ? `${count(comparisons)} comparisons` : "";
  return [created === null ? "" : day(created), from, learnt].filter(Boolean).join(" · ");
}

/**
 * @param {Version} version
 * @returns {[string, string]} words, and which kind of words they are
 */
function gateInWords({ gate }) {
  if (gate === null) return ["not measured", "unknown"];
  const failed = gate.checks.filter(({ passed }) => !passed).length;
  return gate.passed ? ["passed", "good"] : [`failed ${failed} of ${gate.checks.length}`, "bad"];
}

/**
 * @param {number} version
 * @param {readonly WinRate[]} winRates oldest first
 */
function winRate(version, winRates) {
  const rate = winRates.findLast((one) => one.version === version);
  return rate === undefined ? "–" : `${rateInWords(rate)} over ${rate.over}`;
}

/**
 * @param {Traffic | null} traffic
 * @returns {string[]}
 */
function traffic(traffic) {
  if (traffic === null) return ["–", "–", "–", "–", "–"];
  const { requests, errors, completions, unfinished, unrecorded } = traffic;
  return [
    count(requests),
    shareOf(errors, requests),
    firstToken(traffic),
    shareOf(unfinished, completions),
    shareOf(unrecorded, completions),
  ];
}

/** @param {Traffic} traffic */
function firstToken({ timed, first_token_p50: half, first_token_p95: most }) {
  if (timed === 0) return "–";
  if (half === null) return "half > 10 s".replaceAll(" ", "\u00a0");
  const slowest = most === null ? "> 10 s" : `≤ ${most} s`;
  return [`half ≤ ${half} s`, `${percent(0.95)} ${slowest}`].map((words) => words.replaceAll(" ", "\u00a0")).join(", ");
}

/**
 * @param {HTMLElement} root
 * @param {Version | undefined} version
 */
export function showGate(root, version) {
  const gate = version?.gate ?? null;
  if (gate === null) {
    root.replaceChildren(element("p", { class: "soft" }, "It was never measured: traffic for it needs an override."));
    return;
  }
  const rows = gate.checks.map(({ name, value, limit, passed, sentence }) => [
    element("span", { title: sentence }, name),
    digits(value),
    digits(limit),
    passed ? chip("passed", "good") : chip("failed", "bad"),
  ]);
  const told = gate.reported.map(({ sentence }) => element("li", {}, sentence));
  root.replaceChildren(
    table("Checks", ["Check", "Number", "Limit", "Passed"], rows, "The gate has no checks."),
    ...gate.checks.filter(({ passed }) => !passed).map(({ sentence }) => element("p", { class: "problem" }, sentence)),
    ...(told.length ? [element("p", {}, "Told, and decides nothing:"), element("ul", { class: "soft" }, ...told)] : []),
  );
}

/**
 * @param {HTMLElement} root
 * @param {readonly Replica[]} replicas
 */
export function showServers(root, replicas) {
  const rows = replicas.map(({ replica, generation, converged, live, loading, failed, detail }) => [
    replica,
    converged ? chip("serves the release", "good") : chip(`is at generation ${generation}`, "bad"),
    live.join(", ") || "–",
    loading.join(", ") || "–",
    [...Object.entries(failed).map(([version, why]) => `version ${version}: ${why}`), detail].filter(Boolean).join("; ") || "–",
  ]);
  root.replaceChildren(
    table("Servers", ["Server", "Release", "Live", "Loading", "Trouble"], rows, "No server reports."),
  );
}

/**
 * @param {HTMLElement} root
 * @param {readonly Attempt[]} attempts newest first
 */
export function showLog(root, attempts) {
  const rows = attempts.map((attempt) => [
    time(attempt.created),
    inWords(attempt),
    attempt.by || "–",
    attempt.outcome === "accepted" ? chip("done", "good") : element("span", { class: "problem" }, attempt.outcome),
    attempt.reason || "–",
  ]);
  root.replaceChildren(table("Log", ["When", "What", "Who", "Outcome", "Why"], rows, "Nothing has happened yet."));
}

/** @param {Attempt} attempt */
function inWords({ verb, outcome, stable, canary, canary_fraction, version, kind }) {
  if (verb === "publish") return `publish ${kind?.replace("_", " ") ?? "version"} ${version ?? ""}`;
  if (outcome === "accepted" && canary) return `${verb} ${canary} at ${percent(canary_fraction ?? 0)}`;
  return outcome === "accepted" && verb !== "canary" && stable ? `${verb}: ${stable} stable` : verb;
}

/**
 * @param {string} words
 * @param {string} kind
 */
function chip(words, kind) {
  return element("span", { class: `chip ${kind}` }, words);
}
