// The conversation. Unless follow-up questions are on, each question is asked by itself, as `m3 ask` does: small models
// answer best in the form that `generate.prompt` gives to a single question.

import { answer } from "./answer.js";
import { $, h } from "./dom.js";

const BEGIN = $("talk").firstElementChild;

export function start(model) {
  let messages = [];
  let stop = null;

  async function ask(question) {
    BEGIN.remove();
    if (!$("follow").checked) messages = [];
    messages.push({ role: "user", content: question });
    const reply = h("article", { class: "answer", "aria-label": "Answer" });
    const asked = h("article", { class: "question", "aria-label": "Question" }, question);
    $("talk").append(asked, reply);
    asked.scrollIntoView();
    stop = new AbortController();
    $("send").disabled = true;
    $("stop").hidden = false;
    const body = {
      model: model(),
      messages,
      max_tokens: Number($("length").value) || 96,
      stream_options: { include_usage: true },
      memory: { text: true },
    };
    const said = await answer(reply, body, stop.signal);
    if (said) messages.push({ role: "assistant", content: said });
    else messages.pop();
    $("stop").hidden = true;
    $("send").disabled = false;
  }

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!question || $("send").disabled) return;
    $("question").value = "";
    ask(question);
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });
  $("stop").addEventListener("click", () => stop?.abort());
  $("clear").addEventListener("click", () => {
    stop?.abort();
    messages = [];
    $("talk").replaceChildren(BEGIN);
    $("question").focus();
  });
}
