"use strict";

const at = (id) => document.getElementById(id);
// name of a model -> its column, and what was said in it
const columns = new Map();
let running = null;

function element(kind, text, parent, className) {
  const made = document.createElement(kind);
  // never as HTML: it is what a model says
  made.textContent = text;
  if (className) made.className = className;
  parent.append(made);
  return made;
}

function show(name) {
  const section = element("section", "", at("columns"));
  section.dataset.model = name;
  element("h2", name, section);
  columns.set(name, { section, talk: element("div", "", section, "talk"), messages: [] });
}

function chosen() {
  return [...at("models").querySelectorAll("input:checked")].map((box) => box.value);
}

function update() {
  const names = chosen();
  for (const name of names) if (!columns.has(name)) show(name);
  for (const [name, column] of columns) column.section.hidden = !names.includes(name);
  for (const column of columns.values()) column.section.style.display = column.section.hidden ? "none" : "";
}

function request(name, prompt) {
  const asked = { model: name, stream: true };
  // a field that was emptied asks for nothing
  if (at("max_tokens").value !== "") asked.max_tokens = Number(at("max_tokens").value);
  if (at("temperature").value !== "") asked.temperature = Number(at("temperature").value);
  if (asked.temperature !== 0 && at("top_p").value !== "") asked.top_p = Number(at("top_p").value);
  if (at("seed").value !== "") asked.seed = Number(at("seed").value);
  if (at("mode").value === "text") return ["/v1/completions", { ...asked, prompt }];
  const messages = [...columns.get(name).messages, { role: "user", content: prompt }];
  return ["/v1/chat/completions", { ...asked, messages }];
}

// the data of each event of a stream, parsed
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(name, prompt, signal) {
  const column = columns.get(name);
  const said = element("p", prompt, column.talk, "user");
  const answer = element("p", "", column.talk, "assistant busy");
  const [address, body] = request(name, prompt);
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch(address, { method: "POST", headers, body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      answer.textContent += choice.delta ? choice.delta.content || "" : choice.text;
      if (choice.finish_reason === "length") answer.classList.add("cut");
      column.talk.scrollTop = column.talk.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") element("p", error.message, column.talk, "error");
  }
  // what stands on the page has been said, a part of an answer too
  if (body.messages && answer.textContent && answer.isConnected) {
    column.messages = [...body.messages, { role: "assistant", content: answer.textContent }];
  } else if (body.messages) {
    said.classList.add("unsaid");
    answer.remove();
  }
  answer.classList.remove("busy");
}

async function send(event) {
  event.preventDefault();
  const prompt = at("prompt").value;
  const names = chosen();
  if (running || !prompt || !names.length) return;
  running = new AbortController();
  at("prompt").value = "";
  at("send").disabled = true;
  at("stop").disabled = false;
  at("status").textContent = "answering, one model after another";
  await Promise.all(names.map((name) => ask(name, prompt, running.signal)));
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
  at("status").textContent = "";
  at("prompt").focus();
}

function clear() {
  if (running) running.abort();
  for (const column of columns.values()) {
    column.talk.replaceChildren();
    column.messages = [];
  }
}

async function start() {
  const [models, health] = await Promise.all(
    ["/v1/models", "/health"].map(async (address) => (await fetch(address)).json()),
  );
  models.data.forEach((model, number) => {
    const label = element("label", "", at("models"));
    const box = element("input", "", label);
    box.type = "checkbox";
    box.value = model.id;
    // the base and one adapter, side by side
    box.checked = number < 2;
    box.addEventListener("change", update);
    label.append(` ${model.id}`);
  });
  if (!health.chat) {
    at("mode").value = "text";
    at("mode").querySelector("[value=chat]").disabled = true;
  }
  update();
  at("ask").addEventListener("submit", send);
  at("stop").addEventListener("click", () => running && running.abort());
  at("clear").addEventListener("click", clear);
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  at("prompt").focus();
}

start().catch((error) => { at("status").textContent = `cannot reach the server: ${error.message}`; });
