// Tiers, hit rates and the timeline of recalls, looked at every second while they are shown.

import { call } from "./api.js";
import { $, bytes, h, seconds } from "./dom.js";

const SPAN = 60;
const SVG = "http://www.w3.org/2000/svg";
let timer = null;

export function stop() {
  clearTimeout(timer);
  timer = null;
}

export async function show() {
  stop();
  try {
    draw(await call("/v1/observe"));
  } catch (error) {
    $("numbers").replaceChildren(h("p", { class: "error" }, error.message));
  }
  if (!$("live").hidden) timer = setTimeout(show, document.hidden ? 5000 : 1000);
}

function draw(now) {
  const { recall, store, lookahead } = now;
  const rate = lookahead.guesses ? lookahead.hits / lookahead.guesses : null;
  $("numbers").replaceChildren(
    card("Chunks", recall.chunks),
    card("Memories read", recall.memories),
    card("Decoded already", percent(recall.memories ? recall.kept / recall.memories : null)),
    card("Late", recall.late),
    card("Prefetches used", percent(rate)),
    card("Decoded now", `${store.parts}`, `${bytes(store.bytes)} of ${bytes(store.capacity)}`),
  );
  $("tiers").tBodies[0].replaceChildren(...now.tiers.map(tierRow));
  const phases = Object.entries(recall.phases).filter(([, one]) => one.count);
  $("phases").tBodies[0].replaceChildren(
    ...phases.map(([name, one]) =>
      h("tr", {}, h("td", {}, name), number(one.count), number(seconds(one.mean_s)), number(seconds(one.max_s))),
    ),
  );
  $("timeline").replaceChildren(...(now.has_timeline ? figures(now.timeline) : [ h("p", { class: "quiet" }, "The timeline is off: metrics.timeline is 0.")]));
}

const percent = (share) => (share == null ? "–" : `${Math.round(share * 100)} %`);
const number = (value) => h("td", { class: "number" }, `${value}`);

function card(title, value, more) {
  return h("div", { class: "card" }, h("span", { class: "quiet" }, title), h("strong", {}, `${value}`), more ? h("span", { class: "quiet" }, more) : null);
}

function tierRow(tier) {
  const asked = tier.hits + tier.misses + tier.unanswered;
  const rate = asked ? tier.hits / asked : null;
  return h(
    "tr",
    {},
    h("td", {}, tier.name),
    number(tier.blocks ?? "–"),
    number(tier.capacity ? bytes(tier.capacity) : "–"),
    number(tier.hits),
    number(tier.misses),
    h("td", {}, rate == null ? "–" : h("meter", { min: 0, max: 1, value: rate, "aria-hidden": "true" }), rate == null ? "" : ` ${percent(rate)}`),
    number(tier.read.count ? seconds(tier.read.mean_s) : "–"),
  );
}

/** All events of the last minute, and the latest recall by itself. */
function figures(events) {
  const shown = events.filter((event) => event.ended < SPAN);
  if (!shown.length) return [h("p", { class: "quiet" }, "Nothing was recalled in this time. Ask something.")];
  const all = timeline(shown, SPAN, 0, [`${SPAN} s ago`, "now"], `${shown.length} events in the last ${SPAN} seconds`);
  const key = h("figcaption", { class: "quiet" }, h("span", { class: "key now" }), "recall ", h("span", { class: "key ahead" }), "prefetch, ahead of need");
  const latest = shown.filter((event) => event.name === "recall").at(-1);
  if (!latest) return [h("figure", {}, all, key)];
  const during = shown.filter((event) => event.began <= latest.began + 1e-5 && event.ended >= latest.ended - 1e-5);
  const ends = ["the latest recall", seconds(latest.began - latest.ended)];
  const one = timeline(during, latest.began, latest.ended, ends, `phases of the latest recall, ${ends[1]}`);
  return [h("figure", {}, all, key), h("figure", {}, one)];
}

/** Events from one age to another, a line for each phase; ages are in seconds. */
function timeline(events, from, to, [begin, end], label) {
  const names = [...new Set(events.map((event) => event.name))].sort();
  const row = 18;
  const foot = names.length * row + 14;
  const svg = element("svg", { viewBox: `0 0 760 ${foot + 4}`, role: "img", "aria-label": label });
  const x = (age) => 110 + 650 * Math.min(1, Math.max(0, (from - age) / (from - to || 1)));
  names.forEach((name, line) => {
    const y = line * row;
    svg.append(text(name, 0, y + 13), element("line", { class: "line", x1: 110, x2: 760, y1: y + row - 1, y2: y + row - 1 }));
    for (const event of events.filter((one) => one.name === name)) {
      const width = Math.max(2, x(event.ended) - x(event.began));
      const kind = name.startsWith("ahead.") ? "ahead" : "now";
      const bar = element("rect", { class: kind, x: Math.min(x(event.began), 758), y: y + 3, width, height: row - 7, rx: 1 });
      const title = element("title", {});
      title.textContent = `${name}: ${seconds(event.began - event.ended)}, ${event.blocks} blocks, ${event.ended.toFixed(1)} s ago`;
      bar.append(title);
      svg.append(bar);
    }
  });
  const last = text(end, 760, foot);
  last.setAttribute("text-anchor", "end");
  svg.append(text(begin, 110, foot), last);
  return svg;
}

function element(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function text(content, x, y) {
  const made = element("text", { x, y });
  made.textContent = content;
  return made;
}
