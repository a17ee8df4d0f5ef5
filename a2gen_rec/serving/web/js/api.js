// The service, and its refusals in words.

const KEY = "a2gen-api-key";
const PATIENCE_MS = 20_000;

/** What went wrong, as a sentence for the reader. `needsKey`: an API key would help. */
export class Problem extends Error {
  constructor(words, needsKey = false) {
    super(words);
    this.needsKey = needsKey;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export const model = () => ask("/v1/model");
export const users = async () => (await ask("/v1/users?count=8")).users;
export const history = (user, last) => ask(`/v1/users/${encodeURIComponent(user)}/history?last=${last}`);
export const rank = (request) => ask("/v1/rank", request);
export const record = (user, impression) => ask("/v1/events", { user, impressions: [impression] });

async function ask(path, body) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
  } catch (error) {
    throw new Problem(
      error.name === "TimeoutError"
        ? `The service has not answered within ${PATIENCE_MS / 1000} seconds.`
        : "The service cannot be reached. Is it running, and is this computer connected?",
    );
  }
  let content = null;
  try {
    content = await answer.json();
  } catch {
    throw new Problem(`The service answered something that is not JSON (status ${answer.status}).`);
  }
  if (!answer.ok) throw refused(answer, content?.error ?? {});
  return content;
}

function refused(answer, { code, message = "", request_id: request }) {
  const why = message && `: ${message}`;
  const retry = Number(answer.headers.get("Retry-After"));
  const later = retry ? ` Try again in ${retry} s.` : " Try again.";
  switch (answer.status) {
    case 401:
      return new Problem(
        key.get() ? "The service does not take this API key." : "The service asks for an API key.",
        true,
      );
    case 503:
      if (code === "draining") return new Problem("The service is about to end. Try again once it is back.");
      if (code?.startsWith("store")) return new Problem(`The store of impressions does not work now${why}.${later}`);
      return new Problem(`The service has too much to do${why}.${later}`);
    case 504:
      return new Problem(`The ranking took too long: no answer in the time it may take (timeout).${later}`);
    case 507:
      return new Problem(`Nothing was recorded${why}.`);
    case 400:
    case 413:
    case 422:
      return new Problem(`The service does not take this${why}.`);
    default:
      return new Problem(`Something is wrong with the service (status ${answer.status}, request ${request})${why}.`);
  }
}
