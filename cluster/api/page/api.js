// Asking the API: the key, errors as sentences, streams. Paths are relative, so that a proxy may add a prefix.

const KEY = "macrame.key";
const TIMEOUT_MS = 6000;

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  clear: () => sessionStorage.removeItem(KEY),
};

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0: the server could not be reached
  }
}

async function ask(path, options) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (!reply.ok) throw new ApiError(reply.status, await sentence(reply));
  return reply;
}

async function sentence(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `The server answered ${reply.status} without a reason.`;
  }
}

// The JSON at `path`.
export async function get(path) {
  const reply = await ask(path, { signal: AbortSignal.timeout(TIMEOUT_MS) });
  return await reply.json();
}

// The same, but null where this server has no such path.
export async function getIfThere(path) {
  try {
    return await get(path);
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

// The events of a streamed POST, parsed; raises ApiError for an error event and for an end without [DONE].
export async function* stream(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const reply = await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      text += value;
      for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
        const event = text.slice(0, end);
        text = text.slice(end + 2);
        if (!event.startsWith("data: ")) continue;
        if (event === "data: [DONE]") return;
        const data = JSON.parse(event.slice(6));
        if (data.error) throw new ApiError(500, data.error.message);
        yield data;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(0, "The connection to the server broke.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError(0, "The answer ended before it was complete.");
}
