"use strict";
// The page: a chat whose tokens are coloured by bits, and charts of the last minute. Text goes into the page as
// text nodes only, never as HTML.

const $ = (id) => document.getElementById(id);
const KEPT = 120; // two snapshots a second for a minute
const CHARTS = [
  { title: "Queue, waiting", of: (s) => s.num_waiting },
  { title: "Batch, running", of: (s) => s.num_running },
  { title: "Bits of the last pass", of: (s) => s.bits, least: 2 },
  { title: "KV memory used, %", of: (s) => 100 * s.kv_share, most: 100 },
  { title: "Step time, ms", of: (s) => s.step_ms },
  { title: "Deadlines met of those due", of: (s) => s.deadlines_met, second: (s) => s.deadlines_due },
];
let models = [];
let messages = [];
let running = null;
const history = new Map();

async function api(path, options = {}) {
  const key = sessionStorage.getItem("taper-key");
  const headers = { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const reply = await fetch(path, { ...options, headers });
  if (reply.status !== 401) return reply;
  await askKey();
  return api(path, options);
}

function askKey() {
  const dialog = $("login");
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    sessionStorage.setItem("taper-key", $("key").value);
    resolve();
  }, { once: true }));
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data && data !== "data: [DONE]") yield JSON.parse(data.slice(6));
    }
  }
}

function colour(bits, model) {
  const { min_bits: low, max_bits: high } = model.taper;
  const share = high > low ? Math.min(1, Math.max(0, (bits - low) / (high - low))) : 1;
  return `hsl(${Math.round(20 + 190 * share)} 80% 55% / 0.3)`; // orange: few bits, blue: many
}

function legend(model) {
  $("legend").replaceChildren();
  const { min_bits: low, max_bits: high } = model.taper;
  if (high > 8) return;
  for (let bits = low; bits <= high; bits++) {
    const box = document.createElement("span");
    box.textContent = `${bits} bits`;
    box.style.background = colour(bits, model);
    $("legend").append(box);
  }
  const choices = ["auto"];
  for (let bits = low; bits <= high; bits++) choices.push(String(bits));
  $("bits").replaceChildren(...choices.map((value) => new Option(value, value)));
}

const chosen = () => models.find((model) => model.id === $("model").value) || models[0];

function add(kind, text = "") {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = text;
  $("log").append(line);
  $("log").scrollTop = $("log").scrollHeight;
  return line;
}

function body(model, text) {
  const bits = $("bits").value;
  const fields = {
    model: model.id, stream: true, max_tokens: Number($("tokens").value) || 128,
    temperature: Number($("temperature").value) || 0, bits: bits === "auto" ? "auto" : Number(bits),
  };
  if ($("deadline").value) fields.deadline_ms = Number($("deadline").value);
  if (model.taper.has_chat_template) return ["v1/chat/completions", { ...fields, messages }];
  return ["v1/completions", { ...fields, prompt: messages.map((message) => message.content).join("") }];
}

async function ask(text) {
  const model = chosen();
  messages.push({ role: "user", content: text });
  add("turn user", text);
  const line = add("turn answer");
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  let answer = "";
  try {
    const [path, content] = body(model, text);
    const reply = await api(path, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content),
      signal: running.signal,
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    for await (const part of events(reply)) {
      if (part.error) throw new Error(part.error.message);
      const choice = part.choices[0];
      const piece = choice ? choice.text ?? choice.delta?.content ?? "" : "";
      answer += piece;
      if (piece) {
        const token = document.createElement("span");
        token.textContent = piece;
        const bits = typeof part.taper?.bits === "number" ? part.taper.bits : null;
        if (bits !== null) {
          token.style.background = colour(bits, model);
          token.title = `${bits} bits`;
        }
        line.append(token);
        $("log").scrollTop = $("log").scrollHeight;
      }
      if (choice?.finish_reason) note(choice.finish_reason, part.taper || {});
    }
  } catch (error) {
    add("note error", error.name === "AbortError" ? "stopped" : error.message);
  } finally {
    messages.push({ role: "assistant", content: answer });
    running = null;
    $("send").hidden = false;
    $("stop").hidden = true;
  }
}

function note(reason, own) {
  const bits = own.token_bits || [];
  const mean = bits.reduce((sum, one) => sum + one, 0) / (bits.length || 1);
  const met = own.deadline_met === null || own.deadline_met === undefined ? "" :
    own.deadline_met ? ", deadline met" : ", deadline missed";
  add("note", `${bits.length} tokens at ${mean.toFixed(2)} bits, queue ${Math.round(own.queue_ms)} ms, ` +
    `first token ${Math.round(own.first_token_ms ?? 0)} ms, ${reason}${met}`);
}

function chart(spec) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const title = document.createElement("span");
  title.textContent = spec.title;
  const value = document.createElement("b");
  caption.append(title, value);
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  picture.setAttribute("viewBox", "0 0 120 56");
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", spec.title);
  const lines = [spec.of, spec.second].filter(Boolean).map((of, index) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    if (index) path.setAttribute("class", "second");
    picture.append(path);
    return { of, path };
  });
  figure.append(caption, picture);
  $("charts").append(figure);
  return (states) => {
    const series = lines.map(({ of }) => states.map(of));
    const numbers = series.flat().filter((one) => typeof one === "number" && isFinite(one));
    const least = Math.min(spec.least ?? 0, ...numbers);
    const most = Math.max(spec.most ?? least + 1, ...numbers);
    lines.forEach(({ path }, index) => path.setAttribute("d", curve(series[index], least, most)));
    value.textContent = series.map((one) => show(one.at(-1))).join(" / ");
  };
}

function curve(numbers, least, most) {
  let text = "";
  let pen = "M";
  numbers.forEach((number, index) => {
    if (typeof number !== "number") { pen = "M"; return; }
    const x = KEPT - numbers.length + index;
    text += `${pen}${x} ${(53 - 50 * (number - least) / (most - least)).toFixed(1)}`;
    pen = "L";
  });
  return text;
}

const show = (number) => typeof number !== "number" ? "–" : Number.isInteger(number) ? String(number) : number.toFixed(1);

async function watch(charts) {
  for (;;) {
    try {
      const reply = await api("monitor?stream=1");
      if (!reply.ok) throw new Error();
      $("state").textContent = "live";
      for await (const state of events(reply)) {
        for (const [name, one] of Object.entries(state.models)) {
          const states = history.get(name) || [];
          states.push(one);
          if (states.length > KEPT) states.shift();
          history.set(name, states);
        }
        charts.forEach((draw) => draw(history.get(chosen().id) || []));
      }
    } catch { /* tried again below */ }
    $("state").textContent = "server not reached";
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

async function main() {
  models = (await (await api("v1/models")).json()).data;
  $("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  const choose = () => {
    const model = chosen();
    legend(model);
    messages = [];
    if (!model.taper.has_chat_template) $("hint").textContent =
      "This model has no chat template: it continues the text. Each token is coloured by its bits.";
  };
  $("model").addEventListener("change", choose);
  choose();
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("text").value;
    if (!text.trim() || running) return;
    $("text").value = "";
    ask(text);
  });
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("ask").requestSubmit(); }
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => { running?.abort(); messages = []; $("log").replaceChildren(); });
  watch(CHARTS.map(chart));
}

main().catch((error) => { $("state").textContent = error.message; });
