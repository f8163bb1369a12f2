/** @file Reads server-sent events, as chat completions stream them: `data: {…}` lines, then `data: [DONE]`. */

/**
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<any>} the JSON of each event. Throws where the stream ends without its last event.
 */
export async function* streamedEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let unread = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the stream ended early");
      const lines = (unread + decoder.decode(value, { stream: true })).split("\n");
      unread = /** @type {string} */ (lines.pop());
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice("data:".length).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // a stream that failed cannot be cancelled, and need not be
  }
}
