// Elements are made here, never from HTML: what a document says is text.

export const $ = (id) => document.getElementById(id);

/** An element with attributes, listeners (`onclick`) and children: elements or texts. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

/** Show a line about something that went wrong, for a while. */
export function notice(text) {
  const box = $("notice");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(notice.timer);
  notice.timer = setTimeout(() => (box.hidden = true), 8000);
}

/** A number of bytes for people. */
export function bytes(count) {
  if (count == null) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) [count, unit] = [count / 1024, unit + 1];
  return `${count >= 10 || unit === 0 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

/** Seconds for people. */
export function seconds(time) {
  if (time >= 1) return `${time.toFixed(1)} s`;
  return time >= 1e-3 ? `${(time * 1e3).toFixed(1)} ms` : `${Math.round(time * 1e6)} µs`;
}
