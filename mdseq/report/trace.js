"use strict";

// The form of the trace is described in mdseq/report/trace_page.py. Pieces reach the page as text nodes only.

const trace = JSON.parse(document.getElementById("trace").textContent);
const find = (id) => document.getElementById(id);
const SHOWN_RUNS = 8;
const SWIPE_PIXELS = 40;

// ---- The frames: all tokens of each call, from what changed since the call before.

let tokens = new Int32Array(trace.given.length);
const frames = trace.frames.map((frame, number) => {
  tokens = tokens.slice();
  const changed = new Uint8Array(tokens.length);
  let at = -1;
  frame.gaps.forEach((gap, k) => {
    at += gap;
    tokens[at] = frame.tokens[k];
    changed[at] = number > 0 ? 1 : 0;
  });
  return { ...frame, tokens, changed, percent: Uint8Array.from(atob(frame.percent), (byte) => byte.charCodeAt(0)) };
});
const last = frames.length - 1;
const isGiven = [...trace.given].map((digit) => digit === "1");

// ---- The text: one element a token, made once; on a move only those that look otherwise are touched.

const levelOf = (percent) => Math.min(Math.floor((percent * trace.num_levels) / 100), trace.num_levels - 1);
const marks = trace.pieces.map((piece) => (piece === "" ? " empty" : /^\s*\n\s*$/.test(piece) ? " newline" : ""));

function lookOf(i, frame) {
  if (isGiven[i]) return "token given";
  return `token level-${levelOf(frame.percent[i])}${frame.changed[i] ? " changed" : ""}${marks[frame.tokens[i]]}`;
}

const shownToken = Int32Array.from(frames[0].tokens);
const shownLook = Array.from(shownToken, (_, i) => lookOf(i, frames[0]));
const spans = Array.from(shownToken, (token, i) => {
  const span = document.createElement("span");
  span.className = shownLook[i];
  span.append(document.createTextNode(trace.pieces[token]));
  return span;
});
const indexOf = new Map(spans.map((span, i) => [span, i]));
find("text").append(...spans);

let current = 0;

function show(number) {
  current = Math.max(0, Math.min(last, number));
  const frame = frames[current];
  for (let i = 0; i < spans.length; i++) {
    if (shownToken[i] !== frame.tokens[i]) {
      shownToken[i] = frame.tokens[i];
      spans[i].firstChild.data = trace.pieces[frame.tokens[i]];
    }
    const look = lookOf(i, frame);
    if (shownLook[i] !== look) spans[i].className = shownLook[i] = look;
  }
  showMoment(frame);
  if (detailed !== null) showDetail(detailed);
}

// ---- The moment: which call, when, and how far the text is; told to screen readers once the moves have ended.

const percentText = (share) => `${Math.round(100 * share)}%`;
const timestepText = (timestep) => timestep.toLocaleString("en", { maximumFractionDigits: 1 });
const noisiest = Math.max(...frames.map((frame) => frame.timestep));
let announcement = null;

function showMoment(frame) {
  const call = `Call ${frame.call + 1} of ${trace.num_calls}`;
  const timestep = `timestep ${timestepText(frame.timestep)} of ${timestepText(noisiest)}`;
  const time = `${timestep}, noise ${percentText(frame.noise)}`;
  find("call").textContent = call;
  find("time").textContent = time;
  find("confidence").textContent = percentText(frame.mean_confidence);
  find("final").textContent = percentText(frame.final_share);
  find("slider").value = current;
  find("slider").setAttribute("aria-valuetext", `${call}, ${time}`);
  find("cursor").style.left = `${across(current) / 10}%`;
  find("confidence-dot").style.top = dotAt(frame.mean_confidence);
  find("final-dot").style.top = dotAt(frame.final_share);
  clearTimeout(announcement);
  announcement = setTimeout(() => {
    const progress = `mean confidence ${percentText(frame.mean_confidence)}, final ${percentText(frame.final_share)}`;
    find("status").textContent = `${call}, ${progress}`;
  }, 700);
}

// ---- The plot, in a view box of 1000 by 100.

const across = (number) => (last ? (1000 * number) / last : 500);
// The cursor reaches 4 pixels above the plot and 10 below it.
const dotAt = (share) => `calc(4px + (100% - 14px) * ${1 - share} - 4px)`;

function curve(key) {
  const points = frames.map((frame, number) => [across(number), 100 * (1 - frame[key])]);
  if (!last) points.push([1000, points[0][1]], [0, points[0][1]]); // a line, where there is but one call
  return `M${points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;
}
find("confidence-curve").setAttribute("d", curve("mean_confidence"));
find("final-curve").setAttribute("d", curve("final_share"));

for (let level = 0; level < trace.num_levels; level++) {
  const swatch = document.createElement("i");
  swatch.className = `level-${level}`;
  find("levels").append(swatch);
}

// ---- The detail of one token: its confidence, and what it was at every call.

const visible = (piece) => piece.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
let detailed = null;

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Stretches of calls in which token i stayed the same: [first, last] numbers of frames. */
function runsOf(i) {
  const runs = [];
  frames.forEach((frame, number) => {
    if (number && frame.tokens[i] === frames[number - 1].tokens[i]) runs.at(-1)[1] = number;
    else runs.push([number, number]);
  });
  return runs;
}

function historyOf(i) {
  const table = element("table", "");
  const runs = runsOf(i);
  const now = runs.findIndex(([first, end]) => first <= current && current <= end);
  const from = Math.max(0, Math.min(now - (SHOWN_RUNS >> 1), runs.length - SHOWN_RUNS));
  const row = (className, ...cells) => {
    const made = element("tr", className);
    made.append(...cells);
    table.append(made);
  };
  row("", ...["calls", "token", "confidence"].map((heading) => element("th", "", heading)));
  if (from > 0) row("", element("td", "", "earlier"), element("td", "", `${from} more`));
  runs.slice(from, from + SHOWN_RUNS).forEach(([first, end], k) => {
    const calls = [...new Set([frames[first].call + 1, frames[end].call + 1])].join("–");
    const confidence = [...new Set([frames[first].percent[i], frames[end].percent[i]])].join(" → ");
    row(
      from + k === now ? "now" : "",
      element("td", "", calls),
      element("td", "piece", visible(trace.pieces[frames[first].tokens[i]])),
      element("td", "", `${confidence}%`),
    );
  });
  const later = runs.length - from - SHOWN_RUNS;
  if (later > 0) row("", element("td", "", "later"), element("td", "", `${later} more`));
  return table;
}

function stripOf(i) {
  const strip = element("div", "strip");
  const share = 100 / frames.length;
  const stops = frames.map((frame, number) => {
    return `var(--level-${levelOf(frame.percent[i])}) ${number * share}% ${(number + 1) * share}%`;
  });
  strip.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const mark = element("i", "");
  mark.style.left = `${current * share}%`;
  mark.style.width = `max(${share}%, 5px)`;
  strip.append(mark);
  return strip;
}

function showDetail(i) {
  detailed = i;
  const frame = frames[current];
  const detail = find("detail");
  detail.replaceChildren(element("h2", "piece", visible(trace.pieces[frame.tokens[i]])));
  const name = `token ${(i + 1).toLocaleString("en")} of ${spans.length.toLocaleString("en")}`;
  if (isGiven[i]) {
    detail.append(element("p", "", `${name}, given`));
  } else {
    detail.append(element("p", "", `${name}, confidence ${frame.percent[i]}%`), stripOf(i), historyOf(i));
  }
  detail.hidden = false;

  // Below the token where there is room, else above it; inside the window from left to right.
  const token = spans[i].getClientRects()[0] ?? spans[i].getBoundingClientRect();
  const { width, height } = detail.getBoundingClientRect();
  const room = document.documentElement.clientWidth;
  const below = token.bottom + 8;
  const top = below + height > innerHeight && token.top - height - 8 > 0 ? token.top - height - 8 : below;
  detail.style.left = `${scrollX + Math.max(8, Math.min(token.left, room - width - 8))}px`;
  detail.style.top = `${scrollY + top}px`;
}

function hideDetail() {
  detailed = null;
  find("detail").hidden = true;
}

// One token at a time can be reached with Tab; the first that was generated, to begin with.
let reachable = null;

function makeReachable(i) {
  const attributes = { tabindex: "0", role: "button", "aria-describedby": "detail" };
  for (const [name, value] of Object.entries(attributes)) {
    if (reachable !== null) spans[reachable].removeAttribute(name);
    spans[i].setAttribute(name, value);
  }
  reachable = i;
}

function focusToken(i, preventScroll) {
  if (i < 0 || i >= spans.length) return;
  makeReachable(i);
  spans[i].focus({ preventScroll });
  showDetail(i);
}

if (spans.length) makeReachable(Math.max(0, isGiven.indexOf(false)));

// ---- Moving: by slider, plot, keys, swipes, and by itself.

let timer = null;
const unhurried = matchMedia("(prefers-reduced-motion: reduce)");

function go(number) {
  pause();
  show(number);
}

function pause() {
  clearInterval(timer);
  timer = null;
  showPlaying();
}

function play() {
  if (!last) return;
  if (current === last) show(0);
  const milliseconds = unhurried.matches ? 1500 : Math.max(80, Math.min(500, 12000 / frames.length));
  timer = setInterval(() => {
    if (current < last) show(current + 1);
    if (current === last) pause();
  }, milliseconds);
  showPlaying();
}

function showPlaying() {
  find("play").classList.toggle("playing", timer !== null);
  find("play").setAttribute("aria-label", timer === null ? "Play" : "Pause");
}

const toggle = () => (timer === null ? play() : pause());
find("play").addEventListener("click", toggle);
find("slider").addEventListener("input", (event) => go(Number(event.target.value)));

function scrub(event) {
  const box = find("plot").getBoundingClientRect();
  go(Math.round((last * (event.clientX - box.left)) / box.width));
}
find("plot").addEventListener("pointerdown", (event) => {
  find("plot").setPointerCapture(event.pointerId);
  scrub(event);
});
find("plot").addEventListener("pointermove", (event) => {
  if (find("plot").hasPointerCapture(event.pointerId)) scrub(event);
});

const KEYS = {
  ArrowLeft: () => go(current - 1),
  ArrowRight: () => go(current + 1),
  Home: () => go(0),
  End: () => go(last),
  " ": toggle,
  Escape: hideDetail,
};
const TOKEN_KEYS = {
  ArrowUp: (i) => focusToken(i - 1, false),
  ArrowDown: (i) => focusToken(i + 1, false),
  Enter: (i) => showDetail(i),
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  if (event.target === find("play") && event.key === " ") return; // it presses the button
  const i = indexOf.get(event.target);
  const act = i !== undefined && event.key in TOKEN_KEYS ? () => TOKEN_KEYS[event.key](i) : KEYS[event.key];
  if (act === undefined) return;
  event.preventDefault();
  act();
});

// A finger that moves sideways over the text swipes; one that stays on a token taps it.
let touched = null;
find("text").addEventListener("pointerdown", (event) => {
  touched = event.pointerType === "touch" && event.isPrimary ? [event.clientX, event.clientY] : null;
});
find("text").addEventListener("pointercancel", () => (touched = null));
find("text").addEventListener("pointerup", (event) => {
  if (touched === null || !event.isPrimary) return;
  const [right, down] = [event.clientX - touched[0], event.clientY - touched[1]];
  touched = null;
  if (Math.abs(right) > Math.max(SWIPE_PIXELS, 2 * Math.abs(down))) go(current - Math.sign(right));
});

find("text").addEventListener("pointerover", (event) => {
  const i = indexOf.get(event.target);
  if (event.pointerType === "mouse" && i !== undefined) showDetail(i);
});
find("text").addEventListener("pointerout", (event) => {
  if (event.pointerType !== "mouse") return;
  const focused = indexOf.get(document.activeElement);
  if (focused === undefined) hideDetail();
  else showDetail(focused);
});
find("text").addEventListener("focusin", (event) => showDetail(indexOf.get(event.target)));
find("text").addEventListener("focusout", hideDetail);
find("text").addEventListener("click", (event) => {
  const i = indexOf.get(event.target);
  if (i !== undefined) focusToken(i, true);
});
// Not every browser takes the focus from an element when something else is tapped.
document.addEventListener("pointerdown", (event) => {
  if (!indexOf.has(event.target) && indexOf.has(document.activeElement)) document.activeElement.blur();
});

show(0);
