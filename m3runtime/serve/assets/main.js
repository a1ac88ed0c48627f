// The page: its views, and what the server serves.

import { call } from "./api.js";
import * as chat from "./chat.js";
import * as compare from "./compare.js";
import * as corpus from "./corpus.js";
import { $, notice } from "./dom.js";
import * as live from "./live.js";

const VIEWS = ["chat", "compare", "corpus", "live"];
let model = "";
let isNew = true;

async function look() {
  try {
    const seen = await call("/v1/observe").catch(async (error) => {
      if (error.status !== 403) throw error; // a key for some sources only
      return { model: (await call("/v1/models")).data[0].id };
    });
    model = seen.model;
    if (isNew) $("follow").checked = seen.prompt === "chat";
    isNew = false;
    const memories = seen.memories == null ? "" : ` · ${seen.memories.toLocaleString("en")} memories`;
    $("serving").textContent = seen.model + memories;
  } catch (error) {
    $("serving").textContent = "not connected";
    notice(error.message);
  }
}

function open(view) {
  for (const name of VIEWS) {
    const tab = $(`tab-${name}`);
    tab.setAttribute("aria-selected", `${name === view}`);
    tab.tabIndex = name === view ? 0 : -1;
    $(name).hidden = name !== view;
  }
  if (location.hash !== `#${view}`) history.replaceState(null, "", `#${view}`);
  live.stop();
  if (view === "live") live.show();
  if (view === "corpus") corpus.show(look);
  if (view === "chat") $("question").focus();
}

for (const name of VIEWS) {
  $(`tab-${name}`).addEventListener("click", () => open(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = VIEWS[(VIEWS.indexOf(name) + step + VIEWS.length) % VIEWS.length];
    open(next);
    $(`tab-${next}`).focus();
  });
}
const wanted = () => (VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");
addEventListener("hashchange", () => open(wanted()));
chat.start(() => model);
compare.start(() => model);
corpus.start(look);
await look();
open(wanted());
