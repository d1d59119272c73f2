// The chat page: one conversation with the model that this server serves. Model text only ever becomes text nodes.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { model: null, chat: true, messages: [], abort: null };
const SUGGESTIONS = ["What does os.path.join do?", "Which module has Counter?", "Who are you?"];

// Server ------------------------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  if (response.status === 401) {
    openSettings(true);
    $("key").focus();
    return "This server needs an API key: enter it in the settings.";
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

async function connect() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await failure(response));
    const model = (await response.json()).data[0];
    Object.assign(state, { model: model.id, chat: model.chat });
    $("model").textContent = `${model.id} · context ${model.context.toLocaleString("en")} tokens`;
    $("hint").textContent = model.chat
      ? "Everything stays between this page and the machine that serves it."
      : "This is a base model: it continues your text instead of answering it.";
    notice("");
    return true;
  } catch (error) {
    $("model").textContent = "not connected";
    notice(error instanceof TypeError ? "The server can't be reached. Is it still running?" : error.message);
    return false;
  }
}

// Yields the parsed events of a server-sent stream.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection broke off before the answer was complete.");
    buffer += value;
    for (let end; (end = buffer.indexOf("\n\n")) >= 0; buffer = buffer.slice(end + 2)) {
      const data = buffer.slice(0, end).replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// What the person hasn't set is left to the server, which follows the model's own settings.
function requestFor(history) {
  const common = { model: state.model, stream: true, stream_options: { include_usage: true } };
  if (isSet("temperature")) common.temperature = Number($("temperature").value);
  const most = Math.round(Number($("max-tokens").value));
  if (most >= 1) common.max_tokens = most;
  if (!state.chat) return ["/v1/completions", { ...common, prompt: history.at(-1).content }];
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...history];
  return ["/v1/chat/completions", { ...common, messages }];
}

// Conversation ------------------------------------------------------------------------------------------------

async function send(text) {
  if (state.abort || !text.trim()) return;
  if (!state.model && !(await connect())) return;
  notice("");
  state.messages.push({ role: "user", content: text });
  addMessage("user", text);
  await answer();
}

async function answer() {
  const history = state.messages.map(({ role, content }) => ({ role, content }));
  const view = addMessage("assistant", "");
  view.root.classList.add("writing");
  state.abort = new AbortController();
  busy(true);
  let written = "", reason = null, problem = "";
  const started = performance.now();
  try {
    const [path, body] = requestFor(history);
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: state.abort.signal });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice) {
        written += choice.delta?.content ?? choice.text ?? "";
        reason = choice.finish_reason ?? reason;
        whileAtEnd(() => (view.text.textContent = written));
      }
      if (event.usage) {
        const rate = event.usage.completion_tokens / ((performance.now() - started) / 1000);
        $("rate").textContent = `${event.usage.completion_tokens} tokens, ${rate.toFixed(0)}/s`;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else problem = error instanceof TypeError ? "The server can't be reached. Is it still running?" : error.message;
  }
  view.root.classList.remove("writing");
  state.abort = null;
  busy(false);
  finish(view, written, reason, problem);
}

function finish(view, written, reason, problem) {
  if (problem) notice(problem);
  if (!written && problem) {
    view.root.remove();
    const lost = state.messages.pop();
    $("messages").lastElementChild?.remove();
    if (!$("input").value) setInput(lost.content); // nothing that was typed is lost
    $("welcome").hidden = state.messages.length > 0;
    return;
  }
  state.messages.push({ role: "assistant", content: written });
  keep();
  whileAtEnd(() => {
    render(view.text, written);
    const ends = { length: "reached the longest answer", stopped: "stopped" };
    if (ends[reason] || !written) view.root.append(element("p", "end", ends[reason] ?? "the model ended without a word"));
    view.root.append(tools(written));
  });
}

// The conversation stays in this tab over a reload.
function keep() {
  try {
    sessionStorage.setItem("luban.messages", JSON.stringify(state.messages));
  } catch {
    sessionStorage.removeItem("luban.messages"); // too long to be kept
  }
}

function restore() {
  try {
    state.messages = JSON.parse(sessionStorage.getItem("luban.messages") ?? "[]");
  } catch {
    state.messages = [];
  }
  for (const { role, content } of state.messages) {
    const view = addMessage(role, content);
    if (role !== "assistant") continue;
    render(view.text, content);
    view.root.append(tools(content));
  }
}

function tools(text) {
  const bar = element("div", "tools");
  const copy = element("button", "", "Copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1200);
  });
  const again = element("button", "", "Try again");
  again.type = "button";
  again.addEventListener("click", () => {
    const view = again.closest(".message");
    if (state.abort || view !== $("messages").lastElementChild) return;
    state.messages.pop();
    keep();
    view.remove();
    answer();
  });
  bar.append(copy, again);
  return bar;
}

// Text with `code` and fenced blocks, built from text nodes alone.
function render(target, text) {
  target.replaceChildren();
  text.split(/(```[\s\S]*?```)/).forEach((part, index) => {
    if (index % 2) {
      const pre = element("pre");
      pre.append(element("code", "", part.slice(3, -3).replace(/^[\w+-]*\n/, "")));
      target.append(pre);
    } else {
      part.split(/(`[^`\n]+`)/).forEach((piece, i) => target.append(i % 2 ? element("code", "", piece.slice(1, -1)) : piece));
    }
  });
}

function addMessage(role, text) {
  $("welcome").hidden = true;
  const root = element("article", `message ${role}`);
  const body = element("div", "text", text);
  root.append(element("p", "who", role === "user" ? "You" : state.model), body);
  $("messages").append(root);
  $("log").scrollTop = $("log").scrollHeight;
  return { root, text: body };
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

// Page --------------------------------------------------------------------------------------------------------

function whileAtEnd(change) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("messages").setAttribute("aria-busy", String(on));
  if (!on) $("input").focus();
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function setInput(text) {
  const input = $("input");
  input.value = text;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  $("send").disabled = !text.trim();
}

function openSettings(on) {
  $("settings").hidden = !on;
  $("open-settings").setAttribute("aria-expanded", String(on));
}

function reset() {
  state.abort?.abort();
  state.messages = [];
  keep();
  $("messages").replaceChildren();
  $("welcome").hidden = false;
  $("rate").textContent = "";
  notice("");
  $("input").focus();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function isSet(id) {
  return localStorage.getItem(`luban.${id}`) !== null;
}

function remember(id, store) {
  const saved = store.getItem(`luban.${id}`);
  if (saved !== null) $(id).value = saved;
  $(id).addEventListener("input", () => store.setItem(`luban.${id}`, $(id).value));
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(localStorage.getItem("luban.theme") ?? (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => localStorage.getItem("luban.theme") ?? setTheme(dark.matches ? "dark" : "light"));
  $("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    localStorage.setItem("luban.theme", document.documentElement.dataset.theme);
  });

  for (const id of ["temperature", "max-tokens", "system"]) remember(id, localStorage);
  remember("key", sessionStorage);
  const showTemperature = () => {
    $("temperature-value").textContent = isSet("temperature") ? Number($("temperature").value).toFixed(2) : "the model's own";
  };
  $("temperature").addEventListener("input", showTemperature);
  $("temperature").addEventListener("dblclick", () => {
    localStorage.removeItem("luban.temperature");
    showTemperature();
  });
  showTemperature();
  $("key").addEventListener("change", connect);

  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("input").value;
    if (state.abort || !text.trim()) return;
    setInput("");
    send(text);
  });
  $("input").addEventListener("input", () => setInput($("input").value));
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("form").requestSubmit();
    }
  });
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("stop").addEventListener("click", () => state.abort?.abort());
  $("new").addEventListener("click", reset);
  $("open-settings").addEventListener("click", () => openSettings($("settings").hidden));
  document.addEventListener("keydown", (event) => {
    const command = event.ctrlKey || event.metaKey;
    if (event.key === "Escape") {
      if (!$("settings").hidden) openSettings(false);
      else state.abort?.abort();
    } else if (command && event.key === "k") {
      event.preventDefault();
      reset();
    } else if (command && event.key === ",") {
      event.preventDefault();
      openSettings($("settings").hidden);
    }
  });
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("#settings, #open-settings")) openSettings(false);
  });

  for (const text of SUGGESTIONS) {
    const button = element("button", "", text);
    button.type = "button";
    button.addEventListener("click", () => send(text));
    $("suggestions").append(button);
  }
  setInput("");
  connect().then(restore);
}

start();
