/**
 * @file Where answers to compare come from: a blind task of the server's, or a prompt of the person's own. Nothing kept
 * of either says which version an answer is by.
 *
 * @typedef {object} Work
 * @property {string} key names the judgement on it, so that it counts once however often it is sent
 * @property {{task_id: string} | {completion_id: string}} source how a comparison names the candidates
 * @property {{prompt: string} | {messages: Message[]}} asked how a demonstration names the prompt
 * @property {string[]} candidates
 * @property {number | null} expires unix seconds
 * @property {string | null} labeler
 *
 * @typedef {{role?: string, content?: unknown}} Message
 * @typedef {import("./api.js").Api} Api
 */

const PATIENCE_SECONDS = 120;

/**
 * @param {Api} api
 * @param {{count: number, labeler: string | null, signal: AbortSignal}} wanted
 * @returns {Promise<Work>} Throws Refused or Unreachable.
 */
export async function requestTask(api, { count, labeler, signal }) {
  const slow = AbortSignal.timeout(PATIENCE_SECONDS * 1000);
  const body = labeler === null ? { k: count } : { k: count, labeler };
  const task = await api.post("/v1/feedback/tasks", body, { signal: AbortSignal.any([signal, slow]) });
  return {
    key: newKey(),
    source: { task_id: task.id },
    asked: task.messages ? { messages: task.messages } : { prompt: task.prompt },
    candidates: task.candidates.map((/** @type {{text: string}} */ { text }) => text),
    expires: task.expires,
    labeler,
  };
}

/**
 * Have a prompt answered, all answers at once by one version.
 *
 * @param {Api} api
 * @param {string} prompt
 * @param {{count: number, labeler: string | null, signal: AbortSignal}} wanted
 * @param {(texts: string[]) => void} onText called as the answers grow
 * @returns {Promise<Work>} Throws Refused or Unreachable.
 */
export async function askOwnPrompt(api, prompt, { count, labeler, signal }, onText) {
  const messages = [{ role: "user", content: prompt }];
  const candidates = Array(count).fill("");
  let completionId = "";
  for await (const chunk of api.stream("/v1/chat/completions", { messages, n: count, stream: true }, signal)) {
    completionId = chunk.id;
    for (const { index, delta } of chunk.choices) candidates[index] += delta.content ?? "";
    onText(candidates);
  }
  return { key: newKey(), source: { completion_id: completionId }, asked: { messages }, candidates, expires: null, labeler };
}

/** @returns {string} 128 random bits; unlike `crypto.randomUUID` also where the page came over plain HTTP */
function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
