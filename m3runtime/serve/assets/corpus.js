// The corpus: sources, uploads, search and forgetting.

import { memoryOf } from "./answer.js";
import { call, upload } from "./api.js";
import { $, h, notice } from "./dom.js";

const MOST = 100;
const TASKS = { add: "Adding", forget: "Forgetting", verify: "Verifying the bank" };
let last = "";

export function start(changed) {
  const files = $("files");
  const drop = $("drop");
  files.addEventListener("change", async () => {
    const chosen = [...files.files];
    await addAll(chosen, changed);
    files.value = "";
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") addAll([...event.dataTransfer.files], changed);
    });
  }
  $("paste-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const body = { name: $("paste-name").value.trim(), text: $("paste-text").value };
    const done = await follow(body.name, "add", () => call("/v1/corpus/documents", { body }), changed);
    if (done) $("paste-form").reset();
  });
  $("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    find($("search").value);
  });
  let waiting;
  $("filter").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => show(changed), 200);
  });
  $("more").addEventListener("click", () => show(changed, last));
  $("verify").addEventListener("click", () =>
    follow("", "verify", () => call("/v1/corpus/verify", { method: "POST" }), changed),
  );
}

async function find(query) {
  try {
    const { data } = await call("/v1/corpus/search", { body: { query, k: 8 } });
    const best = new Set(data.slice(0, 1).map((one) => one.id));
    const list = data.map((one) => h("li", {}, memoryOf(one, one.id, best)));
    $("found").replaceChildren(list.length ? h("ol", { class: "results" }, list) : h("p", {}, "Nothing is remembered."));
    $("found").dataset.query = query;
  } catch (error) {
    notice(error.message);
  }
}

/** List the sources, from the beginning or from the one `after` a name on. */
export async function show(changed, after = "") {
  try {
    const query = new URLSearchParams({ after, contains: $("filter").value.trim(), limit: MOST });
    const { data, has_more: hasMore, total } = await call(`/v1/corpus/sources?${query}`);
    const body = $("sources").tBodies[0];
    const shown = [...body.rows];
    const known = new Map(shown.map((row) => [row.dataset.key, row]));
    const rows = data.map((source) => known.get(keyOf(source)) ?? rowOf(source, changed));
    if (after) body.append(...rows);
    else if (!rows.length) body.replaceChildren(h("tr", {}, h("td", { colspan: 3, class: "quiet" }, "There is none.")));
    else if (shown.length !== rows.length || rows.some((row, place) => row !== shown[place])) {
      body.replaceChildren(...rows); // otherwise nothing is drawn anew, and focus stays where it is
    }
    last = data.at(-1)?.id ?? "";
    $("more").hidden = !hasMore;
    $("source-count").textContent = `${total}`;
  } catch (error) {
    notice(error.message);
  }
}

const keyOf = (source) => `${source.references} ${source.id}`;

function rowOf(source, changed) {
  const forget = h("button", { type: "button", class: "plain", "aria-label": `Forget ${source.id}` }, "Forget");
  forget.addEventListener("click", () => {
    // the first click asks, the second one does it
    if (!forget.classList.contains("sure")) {
      forget.classList.add("sure");
      forget.textContent = "Forget for good";
      forget.addEventListener("blur", () => (forget.classList.remove("sure"), (forget.textContent = "Forget")), { once: true });
      return;
    }
    forget.disabled = true;
    const query = new URLSearchParams({ source: source.id });
    const begin = () => call(`/v1/corpus/sources?${query}`, { method: "DELETE" });
    follow(source.id, "forget", begin, changed).then((done) => (forget.disabled = done));
  });
  return h(
    "tr",
    { "data-key": keyOf(source) },
    h("td", {}, source.id, source.uploaded ? h("span", { class: "tag" }, "uploaded") : null),
    h("td", { class: "number" }, `${source.references}`),
    h("td", { class: "number" }, forget),
  );
}

async function addAll(files, changed) {
  for (const file of files) {
    await follow(file.name, "add", (progress) => upload(file, progress), changed);
  }
}

/** Begin a change and show it until it has ended. Gives true if it was done. */
async function follow(name, kind, begin, changed) {
  const bar = h("progress", { max: 1 });
  const state = h("span", { class: "quiet" }, "sending …");
  const line = h("li", { "data-kind": kind }, h("strong", {}, `${TASKS[kind]} ${name}`), bar, state);
  $("jobs").prepend(line);
  const end = (text, failed) => {
    bar.remove();
    state.textContent = text;
    line.classList.add(failed ? "failed" : "done");
  };
  try {
    let job = await begin((share) => (bar.value = share));
    bar.removeAttribute("value");
    while (job.status === "queued" || job.status === "running") {
      const { title, done, total } = job.progress;
      state.textContent = title ? `${title}${total > 1 ? ` ${done} of ${total}` : ""} …` : `${job.status} …`;
      if (total > 1) bar.value = done / total;
      await new Promise((resolve) => setTimeout(resolve, 400));
      job = await call(`/v1/corpus/jobs/${job.id}`);
    }
    if (job.status === "failed") {
      end(job.error.message, true);
      return false;
    }
    const { query } = $("found").dataset;
    await Promise.all([show(changed), changed(), query && find(query)]); // what was forgotten is shown no more
    end(summary(kind, job.result));
    return true;
  } catch (error) {
    end(error.message, true);
    return false;
  }
}

const memories = (count) => `${count} ${count === 1 ? "memory" : "memories"}`;

function summary(kind, result) {
  if (kind === "forget") return `${memories(result.forgotten)} forgotten`;
  if (kind === "verify") return result.clean ? `${memories(result.blocks)}, nothing is damaged` : `${result.damage.length} damaged`;
  const unread = result.unread.length ? `; ${result.unread[0]}` : "";
  return `${memories(result.written)} written, ${result.known} known already${unread}`;
}
