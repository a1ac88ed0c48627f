// Requests to this server. A key is asked for when the server answers 401, and kept in this tab only.

import { $ } from "./dom.js";

const KEY = "m3-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}`, ...more } : more;
}

let asking = null;

/** Ask the person for a key, once for all requests that wait for it. Gives false if there is none. */
function askForKey(why) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key").value = "";
    if (why) $("key-why").textContent = why;
    dialog.showModal();
    const done = (key) => {
      if (key) sessionStorage.setItem(KEY, key);
      dialog.close();
      asking = null;
      resolve(Boolean(key));
    };
    $("key-form").onsubmit = (event) => (event.preventDefault(), done($("key").value.trim()));
    $("key-cancel").onclick = () => done("");
    dialog.oncancel = () => done("");
  });
  return asking;
}

async function failure(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // it was no JSON
  }
  return new ApiError(response.status, message);
}

const NO_KEY = "That key is not known here. Try another one.";

/** The response of a request, or an ApiError. `body` is sent as JSON. */
export async function request(path, { body, ...options } = {}) {
  const json = body === undefined ? {} : { "Content-Type": "application/json" };
  for (let had = sessionStorage.getItem(KEY); ; had = sessionStorage.getItem(KEY)) {
    const content = body === undefined ? undefined : JSON.stringify(body);
    const method = body === undefined ? "GET" : "POST";
    const response = await fetch(path, { method, body: content, headers: headers(json), ...options });
    if (response.ok) return response;
    if (response.status !== 401) throw await failure(response);
    if (sessionStorage.getItem(KEY) === had && !(await askForKey(had && NO_KEY))) throw await failure(response);
  }
}

export const call = async (path, options) => (await request(path, options)).json();

/** The events of a streamed answer, as objects. */
export async function* events(path, body, signal) {
  const response = await request(path, { body: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (waiting + value).split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(500, event.error.message);
      yield event;
    }
  }
}

/** Upload a file; `progress` is called with the share that was sent. Gives the job. */
export function upload(file, progress) {
  const send = () =>
    new Promise((resolve, reject) => {
      const form = new FormData();
      form.append("file", file, file.name);
      const sending = new XMLHttpRequest();
      sending.open("POST", "/v1/corpus/documents");
      for (const [name, value] of Object.entries(headers())) sending.setRequestHeader(name, value);
      sending.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
      sending.onload = () => {
        let answer = {};
        try {
          answer = JSON.parse(sending.responseText);
        } catch {
          // it was no JSON
        }
        if (sending.status === 202) resolve(answer);
        else reject(new ApiError(sending.status, answer.error?.message ?? `the server answered ${sending.status}`));
      };
      sending.onerror = () => reject(new ApiError(0, "the server did not take the file: it may be too large"));
      sending.send(form);
    });
  return send().catch(async (error) => {
    if (error.status === 401 && (await askForKey())) return send();
    throw error;
  });
}
