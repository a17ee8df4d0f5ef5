// Client of the HTTP API, with error messages for the reader. Paths are relative to the page, which a proxy may serve
// under a prefix.

const KEY = "a2gen-api-key";
const TIMEOUT_MS = 20_000;

/** Error with a message for the reader. `needsKey`: an API key is missing or invalid. */
export class ApiError extends Error {
  constructor(message, needsKey = false) {
    super(message);
    this.needsKey = needsKey;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  remove: () => sessionStorage.removeItem(KEY),
};

export const model = () => request("v1/model");
export const users = async () => (await request("v1/users?count=8")).users;
export const history = (user, last) => request(`v1/users/${encodeURIComponent(user)}/history?last=${last}`);
export const rank = (body) => request("v1/rank", body);
export const record = (user, impression) => request("v1/events", { user, impressions: [impression] });

async function request(path, body) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
  } catch (error) {
    throw new ApiError(
      error.name === "TimeoutError"
        ? `No response from the service within ${TIMEOUT_MS / 1000} seconds.`
        : "Cannot reach the service. Check that it is running and that this computer is online.",
    );
  }
  let content = null;
  try {
    content = await response.json();
  } catch {
    throw new ApiError(`Invalid response: not JSON (status ${response.status}).`);
  }
  if (!response.ok) throw errorOf(response, content?.error ?? {});
  return content;
}

function errorOf(response, { code, message = "", request_id: requestId }) {
  const reason = message && `: ${message}`;
  const retryAfter = Number(response.headers.get("Retry-After"));
  const retry = retryAfter ? ` Try again in ${retryAfter} s.` : " Try again.";
  switch (response.status) {
    case 401:
      return new ApiError(key.get() ? "Invalid API key." : "The service requires an API key.", true);
    case 503:
      if (code === "draining") return new ApiError("The service is shutting down. Try again once it is back.");
      if (code?.startsWith("store")) return new ApiError(`Event store unavailable${reason}.${retry}`);
      return new ApiError(`The service is overloaded${reason}.${retry}`);
    case 504:
      return new ApiError(`The ranking timed out.${retry}`);
    case 507:
      return new ApiError(`Not recorded${reason}.`);
    case 400:
    case 413:
    case 422:
      return new ApiError(`Invalid request${reason}.`);
    default:
      return new ApiError(`Service error (status ${response.status}, request ${requestId})${reason}.`);
  }
}
