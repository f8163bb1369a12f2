/** @file The release in words and as shares of the traffic, and what can be done with it now. */

import { byId, element } from "./element.js";
import { percent, time } from "./figures.js";

/**
 * @typedef {object} Release as `GET /v1/release` tells it
 * @property {number | null} stable
 * @property {number | null} canary
 * @property {number} canary_fraction
 * @property {number | null} previous
 * @property {number} generation
 * @property {number} changed_at
 * @property {string} by
 * @property {string} reason
 * @property {import("./operator_verdict.js").Verdict | null} verdict
 * @property {import("./operator_tables.js").Replica[]} replicas
 *
 * @typedef {"canary" | "promote" | "rollback"} Verb
 *
 * @typedef {object} Move
 * @property {string} label of its button
 * @property {string} note what there is to know before pressing it
 * @property {boolean} possible
 */

/**
 * @param {Release} release
 * @returns {string} one sentence
 */
export function inSentence({ stable, canary, canary_fraction }) {
  if (stable === null) return "No version is stable yet.";
  if (canary === null) return `Version ${stable} serves everyone.`;
  return `Version ${canary} serves ${percent(canary_fraction)} as the canary, version ${stable} the rest.`;
}

/** @param {Release} release */
export function showRelease(release) {
  const { stable, canary, canary_fraction, previous } = release;
  byId("serving").textContent = inSentence(release);
  const shares = [
    { role: "stable", version: stable, share: 1 - canary_fraction },
    { role: "canary", version: canary, share: canary_fraction },
    { role: "previous", version: previous, share: 0 },
  ].filter(({ version }) => version !== null);
  byId("traffic").replaceChildren(...shares.filter(({ share }) => share > 0).map(bar));
  byId("shares").replaceChildren(
    ...shares.map(({ role, version, share }) =>
      element("li", { class: role }, element("b", {}, `Version ${version}`), ` ${role}, ${percent(share)}`),
    ),
  );
  const why = release.reason ? `: ${release.reason}` : "";
  byId("changed").textContent =
    release.generation > 0
      ? `Generation ${release.generation}, since ${time(release.changed_at)}, by ${release.by || "nobody named"}${why}`
      : "Nothing was ever released.";
}

/** @param {{role: string, share: number}} part */
function bar({ role, share }) {
  const made = element("div", { class: role });
  made.style.flexGrow = String(share); // as an attribute the policy would forbid it
  return made;
}

/**
 * What can be done with a release, and what speaks against it.
 *
 * @param {Release} release
 * @param {readonly number[]} candidates versions that may become the canary
 * @returns {Record<Verb, Move>}
 */
export function movesOf({ stable, canary, previous, verdict }, candidates) {
  const moves = {
    canary: { label: "Start a canary…", note: "", possible: false },
    promote: { label: "Promote…", note: "There is no canary to promote.", possible: false },
    rollback: { label: "Roll back…", note: "There is neither a canary nor a previous version.", possible: false },
  };
  if (stable === null) moves.canary.note = "There is no stable version to compare a canary with.";
  else if (canary !== null) moves.canary.note = `Version ${canary} is the canary: promote it or drop it first.`;
  else if (candidates.length === 0) moves.canary.note = "There is no other version.";
  else moves.canary = { label: "Start a canary…", note: "A version serves part of the traffic.", possible: true };
  if (canary !== null) {
    const decided = verdict?.decision === "better" || (verdict?.decision === "not_worse" && !verdict.must_be_better);
    const note = decided ? "The verdict allows it." : "The verdict does not allow it yet: it would need an override.";
    moves.promote = { label: `Promote version ${canary}…`, note, possible: true };
    const back = `Version ${stable} serves everyone again.`;
    moves.rollback = { label: `Drop canary ${canary}…`, note: back, possible: true };
  } else if (previous !== null) {
    const back = `Version ${stable} serves nobody any more.`;
    moves.rollback = { label: `Return to version ${previous}…`, note: back, possible: true };
  }
  return moves;
}

/**
 * @param {Record<Verb, Move>} moves
 * @param {boolean} connected without the server nothing can be done
 */
export function showMoves(moves, connected) {
  for (const [verb, { label, note, possible }] of Object.entries(moves)) {
    const button = byId(`move-${verb}`);
    button.textContent = label;
    // Not disabled: it can be reached, and says why it does nothing.
    button.ariaDisabled = String(!(possible && connected));
    byId(`why-${verb}`).textContent = connected ? note : "The server does not answer.";
  }
}
