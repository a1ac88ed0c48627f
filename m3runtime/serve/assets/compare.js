// The same question with memory, with text in the prompt, and with nothing, next to one another.

import { answer } from "./answer.js";
import { $, h } from "./dom.js";

const WAYS = [
  ["With memory", "The model reads stored keys and values.", { text: true }],
  ["With text in the prompt", "The same references are in the prompt.", { as_text: true, text: true }],
  ["With nothing", "The model as it is.", { off: true }],
];

export function start(model) {
  let stop = null;

  $("compare-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const question = $("compare-question").value.trim();
    if (!question) return;
    stop?.abort();
    stop = new AbortController();
    const { signal } = stop;
    const columns = WAYS.map(([title, what]) =>
      h("article", { class: "answer", "aria-label": title }, h("h2", {}, title), h("p", { class: "quiet" }, what)),
    );
    $("columns").replaceChildren(...columns);
    for (const [place, [, , memory]] of WAYS.entries()) {
      // one after the other: none should be slow because of another
      if (signal.aborted) return;
      const messages = [{ role: "user", content: question }];
      const body = { model: model(), messages, max_tokens: 64, temperature: 0, memory };
      await answer(columns[place], { ...body, stream_options: { include_usage: true } }, signal);
    }
  });
}
