/* The server's HTTP interface: JSON, errors, streams, and the key, which this tab alone remembers. */

const KEY = "imprint-api-key";

/** An answer of the server that is no success. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
  }
}

/** What the page calls where a key is missing or wrong; set once, by app.js. */
export const hooks = { unauthorized: () => {} };

export function apiKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** The response, if it is a success; otherwise throws ApiError. */
export async function request(method, path, { body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  const key = apiKey();
  if (key) sent.Authorization = `Bearer ${key}`;
  let payload = body;
  if (body !== undefined && !(body instanceof FormData)) {
    sent["Content-Type"] = "application/json";
    payload = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, { method, headers: sent, body: payload, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server cannot be reached.", code: "unreachable" });
  }
  if (response.ok) return response;
  const error = await errorOf(response);
  if (response.status === 401 && key === apiKey()) hooks.unauthorized(error.message); // else another is in use by now
  throw error;
}

async function errorOf(response) {
  try {
    return new ApiError(response.status, (await response.json()).error);
  } catch {
    const message = `The server answered with status ${response.status}.`;
    return new ApiError(response.status, { message, code: "http_error" });
  }
}

export async function getJson(path, signal) {
  return (await request("GET", path, { signal })).json();
}

export async function postJson(path, body) {
  return (await request("POST", path, { body })).json();
}

/** Events of a stream as {id, data}, until `[DONE]`. Throws ApiError for an error within it. */
export async function* stream(method, path, { body, lastId, signal } = {}) {
  const headers = { Accept: "text/event-stream" };
  if (lastId) headers["Last-Event-ID"] = lastId;
  const response = await request(method, path, { body, headers, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError(0, { message: "The stream broke off.", code: "stream_broken" });
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const event = parsed(block);
        if (event === null) continue;
        if (event.data === "[DONE]") return;
        const data = JSON.parse(event.data);
        if (data.error) throw new ApiError(response.status, data.error);
        yield { id: event.id, data };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  let id = null;
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("id: ")) id = line.slice(4);
    else if (line.startsWith("data: ")) data.push(line.slice(6));
  }
  return data.length ? { id, data: data.join("\n") } : null;
}

const GIVE_UP_AFTER = 10;

/** Everything that happens to an adaptation, over broken connections too: none missed, none twice.

`onLost()` is called for each connection that broke off. */
export async function* follow(id, signal, onLost) {
  let lastId = null;
  let failures = 0;
  for (;;) {
    try {
      const path = `/v1/adaptations/${encodeURIComponent(id)}/events`;
      for await (const event of stream("GET", path, { lastId, signal })) {
        lastId = event.id ?? lastId;
        failures = 0;
        yield event.data;
      }
      return;
    } catch (error) {
      const again = error instanceof ApiError && (error.status === 0 || error.status >= 500 ||
        error.code === "draining" || error.code === "queue_full");
      failures += 1;
      if (!again || failures > GIVE_UP_AFTER) throw error;
      onLost();
    }
    await pause(Math.min(8000, 400 * 2 ** failures), signal);
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
