// One answer: its text as it comes, and under it the memories that were read, chunk by chunk.

import { events } from "./api.js";
import { h } from "./dom.js";

/** Ask, and show the answer in an element as it is written. Gives its text. */
export async function answer(into, body, signal) {
  const text = h("p", { class: "text" });
  const memories = h("div", { class: "memories" });
  const facts = h("p", { class: "facts quiet" });
  into.append(text, memories, facts);
  into.setAttribute("aria-busy", "true");
  const began = performance.now();
  let [said, first, read, usage, reason, grounded] = ["", null, [], null, null, null];
  try {
    for await (const event of events("/v1/chat/completions", body, signal)) {
      const choice = event.choices?.[0];
      usage = event.usage ?? usage;
      const now = choice?.delta?.memories;
      if (now) {
        read.push({ memories: now, start: now[0]?.start_index ?? [...said].length });
        showMemories(memories, read, said);
      }
      if (choice?.delta?.references) {
        memories.replaceChildren(referencesOf(choice.delta.references));
      }
      grounded = choice?.delta?.grounded ?? grounded;
      if (choice?.delta?.content) {
        first ??= performance.now() - began;
        said += choice.delta.content;
        text.textContent = said;
      }
      reason = choice?.finish_reason ?? reason;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      into.append(h("p", { class: "error" }, error.message));
    }
    reason = "stopped";
  } finally {
    into.removeAttribute("aria-busy");
  }
  if (!said && !into.querySelector(".error")) text.append(h("em", {}, "The model ended its answer at once."));
  if (read.length) showMemories(memories, read, said);
  else if (said && !body.memory?.off && !body.memory?.as_text) {
    memories.append(h("p", { class: "quiet" }, "Nothing was recalled: the answer is the model's own."));
  }
  if (grounded === false) {
    const told = "Not grounded: the memory that was read most does not bear the answer out.";
    text.after(h("p", { class: "ungrounded" }, told));
  }
  facts.textContent = factsOf(performance.now() - began, first, usage, reason);
  return said;
}

function factsOf(total, first, usage, reason) {
  const parts = [];
  if (first != null) parts.push(`first word after ${(first / 1000).toFixed(1)} s`, `all in ${(total / 1000).toFixed(1)} s`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    parts.push(`${usage.prompt_tokens - cached} tokens of the prompt`);
    if (cached) parts.push(`${cached} tokens from memories`);
    parts.push(`${usage.completion_tokens} of the answer`);
  }
  if (reason === "length") parts.push("cut off at the most tokens");
  if (reason === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

/** Show the memories of each recall, and the part of the answer that was written with them. */
function showMemories(into, read, said) {
  const open = new Set([...into.querySelectorAll("details[open][data-id]")].map((one) => one.dataset.id));
  const wasShut = into.querySelector(":scope > details:not([open])");
  const count = new Set(read.flatMap(({ memories }) => memories.map((memory) => memory.id))).size;
  const letters = [...said]; // places count characters, and a text's own places count halves of some
  const chunks = read.map(({ memories, start }, number) => {
    if (!memories.length) return null;
    const end = read[number + 1]?.start;
    const part = letters.slice(start, end).join("").trim();
    const isPrompt = end === 0;
    return chunkOf(number, memories, isPrompt ? "" : part, open);
  });
  const title = `${count} ${count === 1 ? "memory" : "memories"} read`;
  into.replaceChildren(h("details", { class: "read", open: !wasShut }, h("summary", {}, title), chunks));
}

/** The references that stand in the prompt as text. */
function referencesOf(references) {
  const title = `${references.length} ${references.length === 1 ? "reference" : "references"} in the prompt`;
  const items = references.map((one) => h("li", {}, memoryOf(one)));
  return h("details", { class: "read", open: true }, h("summary", {}, title), h("ol", { class: "results" }, items));
}

function chunkOf(number, memories, part, open) {
  const title = part ? `for “${part.length > 90 ? `${part.slice(0, 88)} …` : part}”` : "while the question was read";
  const items = memories.map((memory) => h("li", {}, memoryOf(memory, `${number}/${memory.id}`, open)));
  return h("div", { class: "chunk" }, h("h3", {}, title), h("ol", {}, items));
}

/** A memory or a search's result: its score and source, and its text when it is opened. */
export function memoryOf(memory, key = `${memory.id}`, open = new Set()) {
  const share = Math.max(0, Math.min(1, memory.score));
  return h(
    "details",
    { "data-id": key, open: open.has(key) },
    h(
      "summary",
      {},
      h("meter", { min: 0, max: 1, value: share, "aria-hidden": "true" }),
      h("span", { class: "score" }, h("span", { class: "hidden" }, "score "), memory.score.toFixed(2)),
      h("span", { class: "source" }, memory.source),
      memory.text ? h("span", { class: "begin quiet", "aria-hidden": "true" }, memory.text) : null,
    ),
    memory.heading ? h("p", { class: "heading quiet" }, memory.heading) : null,
    h("blockquote", {}, memory.text ?? ""),
  );
}
