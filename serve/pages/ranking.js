/**
 * @file A ranking in the making: groups of candidates, best first; a group is a tie. Pure: every step makes a new one,
 * so undo is keeping the old one.
 *
 * @typedef {object} Ranking
 * @property {number} count how many candidates there are
 * @property {readonly (readonly number[])[]} groups candidates ranked so far, best group first
 * @property {boolean} tieNext whether the next candidate joins the last group
 * @property {boolean} allBad whether they were tied because none is good
 */

/**
 * @param {number} count
 * @returns {Ranking}
 */
export function unranked(count) {
  return { count, groups: [], tieNext: false, allBad: false };
}

/**
 * Rank a candidate behind those ranked so far, or with the last of them where a tie was announced; one that is ranked
 * already is taken out. Of two candidates, the other comes second.
 *
 * @param {Ranking} ranking
 * @param {number} candidate
 * @returns {Ranking}
 */
export function place(ranking, candidate) {
  if (ranking.count === 2) return changed(ranking, [[candidate], [1 - candidate]]);
  if (ranking.allBad) return changed(ranking, [[candidate]]);
  const last = ranking.groups.length - 1;
  if (ranking.tieNext) {
    const tied = ranking.groups[last].includes(candidate);
    return tied ? changed(ranking, ranking.groups) : joinGroup(ranking, candidate, last);
  }
  return groupOf(ranking, candidate) >= 0 ? takeOut(ranking, candidate) : insertGroup(ranking, candidate, last + 1);
}

/**
 * Announce that the next candidate ties with the last; again, that it does not. Two candidates tie at once.
 *
 * @param {Ranking} ranking
 * @returns {Ranking}
 */
export function tie(ranking) {
  if (ranking.count === 2) return changed(ranking, [[0, 1]]);
  const possible = ranking.groups.length > 0 && !isComplete(ranking);
  return possible ? { ...ranking, tieNext: !ranking.tieNext } : ranking;
}

/**
 * @param {Ranking} ranking
 * @returns {Ranking} all tied, none good
 */
export function allBad(ranking) {
  return { ...changed(ranking, [[...Array(ranking.count).keys()]]), allBad: true };
}

/**
 * Tie a candidate with a group.
 *
 * @param {Ranking} ranking
 * @param {number} candidate
 * @param {number} group counted before the candidate leaves its own
 * @returns {Ranking}
 */
export function joinGroup(ranking, candidate, group) {
  const groups = without(ranking, candidate);
  groups[group].push(candidate);
  return changed(ranking, groups);
}

/**
 * Give a candidate a rank of its own.
 *
 * @param {Ranking} ranking
 * @param {number} candidate
 * @param {number} place how many groups are better, counted before the candidate leaves its own
 * @returns {Ranking}
 */
export function insertGroup(ranking, candidate, place) {
  const groups = without(ranking, candidate);
  groups.splice(place, 0, [candidate]);
  return changed(ranking, groups);
}

/**
 * @param {Ranking} ranking
 * @param {number} candidate
 * @returns {Ranking}
 */
export function takeOut(ranking, candidate) {
  return changed(ranking, without(ranking, candidate));
}

/**
 * Move a ranked candidate half a rank: out of a tie, or into one with its neighbour.
 *
 * @param {Ranking} ranking
 * @param {number} candidate
 * @param {-1 | 1} direction -1 is better
 * @returns {Ranking}
 */
export function shift(ranking, candidate, direction) {
  const at = groupOf(ranking, candidate);
  if (at < 0) return ranking;
  if (ranking.groups[at].length > 1) return insertGroup(ranking, candidate, direction < 0 ? at : at + 1);
  const neighbour = at + direction;
  return neighbour in ranking.groups ? joinGroup(ranking, candidate, neighbour) : ranking;
}

/**
 * @param {Ranking} ranking
 * @param {number} candidate
 * @returns {number} the group that the candidate is in; -1 where it is not ranked
 */
export function groupOf(ranking, candidate) {
  return ranking.groups.findIndex((group) => group.includes(candidate));
}

/**
 * @param {Ranking} ranking
 * @returns {number} how many candidates are ranked
 */
export function rankedCount(ranking) {
  return ranking.groups.flat().length;
}

/**
 * @param {Ranking} ranking
 * @returns {boolean}
 */
export function isComplete(ranking) {
  return rankedCount(ranking) === ranking.count;
}

/**
 * @param {Ranking} ranking a complete one
 * @returns {object} the part of a comparison's body that says it
 */
export function judgementOf({ count, groups, allBad }) {
  if (count > 2) return allBad ? { ranking: groups, metadata: { all_bad: "true" } } : { ranking: groups };
  if (groups.length === 1) return { preferred: allBad ? "both_bad" : "tie" };
  return { preferred: groups[0][0] };
}

/**
 * @param {number} group
 * @returns {string} 1st, 2nd, 3rd, …
 */
export function ordinal(group) {
  return `${group + 1}${["st", "nd", "rd"][group] ?? "th"}`;
}

/**
 * @param {Ranking} ranking
 * @param {number} candidate
 * @returns {string} where a candidate stands, in words
 */
export function standing(ranking, candidate) {
  const at = groupOf(ranking, candidate);
  if (at < 0) return "not ranked";
  if (ranking.allBad) return "bad, as all are";
  const others = ranking.groups[at].filter((other) => other !== candidate).map((other) => other + 1);
  return others.length ? `${ordinal(at)}, tied with ${others.join(" and ")}` : ordinal(at);
}

/**
 * @param {Ranking} ranking
 * @param {number} candidate
 * @returns {number[][]} the groups without the candidate; its own may be empty
 */
function without(ranking, candidate) {
  return ranking.groups.map((group) => group.filter((other) => other !== candidate));
}

/**
 * @param {Ranking} ranking
 * @param {readonly (readonly number[])[]} groups
 * @returns {Ranking}
 */
function changed({ count }, groups) {
  const kept = groups.filter((group) => group.length > 0).map((group) => [...group].sort((a, b) => a - b));
  return { count, groups: kept, tieNext: false, allBad: false };
}
