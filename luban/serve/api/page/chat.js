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
    offer((await response.json()).data);
    notice("");
    return true;
  } catch (error) {
    $("model").textContent = "not connected";
    notice(error instanceof TypeError ? "The server can't be reached. Is it still running?" : error.message);
    return false;
  }
}

// The model and its adapters to choose from, where there are any; the choice is kept for the next visit.
function offer(models) {
  $("choice").replaceChildren(...models.map(({ id }) => element("option", "", id)));
  $("choice").hidden = models.length < 2;
  $("choice").onchange = () => {
    localStorage.setItem("luban.model", $("choice").value);
    use(models[$("choice").selectedIndex]);
  };
  const kept = models.findIndex(({ id }) => id === localStorage.getItem("luban.model"));
  $("choice").selectedIndex = Math.max(kept, 0);
  use(models[$("choice").selectedIndex]);
}

// What follows is asked of this model.
function use(model) {
  Object.assign(state, { model: model.id, chat: model.chat });
  $("model").textContent = `${model.id} · context ${model.context.toLocaleString("en")} tokens`;
  $("hint").textContent = model.chat
    ? "Everything stays between this page and the machine that serves it."
    : "This is a base model: it continues your text instead of answering it.";
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
  for (const [id, field] of [["top-p", "top_p"], ["top-k", "top_k"], ["seed", "seed"]]) {
    if ($(id).value !== "") common[field] = Number($(id).value);
  }
  const shown = $("probabilities").checked;
  if (!state.chat) return ["/v1/completions", { ...common, ...(shown ? { logprobs: 3 } : {}), prompt: history.at(-1).content }];
  if (shown) Object.assign(common, { logprobs: true, top_logprobs: 3 });
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

// The answer to the newest messages that fit the context, and how many older ones were left out.
async function ask(history, signal) {
  const starts = history.flatMap(({ role }, index) => (role === "user" ? [index] : []));
  for (const dropped of starts) {
    const [path, body] = requestFor(history.slice(dropped));
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (response.ok) return [response, dropped];
    const full = response.status === 422 && (await response.clone().json()).error.code === "context_length_exceeded";
    if (!full || !state.chat || dropped === starts.at(-1)) throw new Error(await failure(response));
  }
}

// Tokens of a piece of an answer with their probabilities: {text, probability, others}, where they were asked for.
function tokensOf(choice, decoder) {
  const found = choice.logprobs;
  const share = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)}%`;
  if (found?.content) {
    return found.content.map((each) => ({
      text: each.bytes ? decoder.decode(new Uint8Array(each.bytes), { stream: true }) : each.token, // half a character shows with its end
      probability: Math.exp(each.logprob), others: each.top_logprobs.map((top) => `${JSON.stringify(top.token)} ${share(top.logprob)}`),
    }));
  }
  return (found?.tokens ?? []).map((text, index) => ({
    text, probability: Math.exp(found.token_logprobs[index]),
    others: Object.entries(found.top_logprobs?.[index] ?? {}).map(([token, logprob]) => `${JSON.stringify(token)} ${share(logprob)}`),
  }));
}

// An answer as its tokens, the less likely the darker, with probabilities on hover and focus.
function renderTokens(target, tokens) {
  target.replaceChildren(...tokens.map(({ text, probability, others }) => {
    const made = element("span", "token", text);
    made.title = [`probability ${(100 * probability).toFixed(1)}%`, ...others].join("\n");
    made.style.setProperty("--doubt", (1 - probability).toFixed(2));
    return made;
  }));
}

async function answer() {
  const history = state.messages.map(({ role, content }) => ({ role, content }));
  const view = addMessage("assistant", "");
  view.root.classList.add("writing");
  state.abort = new AbortController();
  busy(true);
  let written = "", reason = null, problem = "", citations = null;
  const tokens = [], decoder = new TextDecoder();
  const started = performance.now();
  try {
    const [response, dropped] = await ask(history, state.abort.signal);
    if (dropped) view.root.prepend(element("p", "dropped", `The oldest ${dropped === 1 ? "message" : `${dropped} messages`} no longer fit the context and were left out.`));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      citations = event.citations ?? citations;
      if (choice) {
        written += choice.delta?.content ?? choice.text ?? "";
        reason = choice.finish_reason ?? reason;
        tokens.push(...tokensOf(choice, decoder));
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
  finish(view, { written, reason, problem, tokens, citations });
}

function finish(view, { written, reason, problem, tokens, citations }) {
  if (problem) notice(problem);
  if (!written && problem) {
    view.root.remove();
    const lost = state.messages.pop();
    $("messages").lastElementChild?.remove();
    if (!$("input").value) setInput(lost.content); // nothing that was typed is lost
    $("welcome").hidden = state.messages.length > 0;
    return;
  }
  state.messages.push({ role: "assistant", content: written, ...(citations ? { citations } : {}) });
  keep();
  whileAtEnd(() => {
    if (tokens.length) renderTokens(view.text, tokens);
    else render(view.text, written);
    const ends = { length: "reached the longest answer", stopped: "stopped" };
    if (ends[reason] || !written) view.root.append(element("p", "end", ends[reason] ?? "the model ended without a word"));
    view.root.append(...cards(citations), tools(written));
  });
}

// The passages that an answer cites, each a card that opens on its text; nothing where the server has no index.
function cards(citations) {
  if (!citations) return [];
  if (!citations.length) return [element("p", "end", "No passage supports this.")];
  return citations.map(({ mark, title, text, source, start, stop }) => {
    const card = element("details", "citation");
    const head = element("summary", "", `[${mark}] ${title || source}`);
    card.append(head, element("p", "passage", text), element("p", "source", `${source}, characters ${start} to ${stop}`));
    return card;
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
  for (const { role, content, citations } of state.messages) {
    const view = addMessage(role, content);
    if (role !== "assistant") continue;
    render(view.text, content);
    view.root.append(...cards(citations), tools(content));
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

// Text with `code`, fenced blocks and **emphasis**, built from text nodes alone.
function render(target, text) {
  target.replaceChildren();
  text.split(/(```[\s\S]*?```)/).forEach((part, index) => {
    if (index % 2) {
      const pre = element("pre");
      pre.append(element("code", "", part.slice(3, -3).replace(/^[\w+-]*\n/, "")));
      target.append(pre);
    } else {
      part.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).forEach((piece, i) => {
        if (!(i % 2)) target.append(piece);
        else target.append(piece[0] === "`" ? element("code", "", piece.slice(1, -1)) : element("strong", "", piece.slice(2, -2)));
      });
    }
  });
}

function addMessage(role, text) {
  $("welcome").hidden = true;
  const root = element("article", `message ${role}`);
  const body = element("div", "text", text);
  root.append(element("p", "who", role === "user" ? "You" : state.model), body);
  if (role === "user") root.append(editing(root));
  $("messages").append(root);
  $("log").scrollTop = $("log").scrollHeight;
  return { root, text: body };
}

// A message goes back into the box; it and what followed it leave the conversation.
function editing(root) {
  const bar = element("div", "tools");
  const edit = element("button", "", "Edit");
  edit.type = "button";
  edit.addEventListener("click", () => {
    if (state.abort) return;
    const views = [...$("messages").children], index = views.indexOf(root);
    setInput(state.messages[index].content);
    state.messages.length = index;
    views.slice(index).forEach((view) => view.remove());
    $("welcome").hidden = index > 0;
    keep();
    $("input").focus();
  });
  bar.append(edit);
  return bar;
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

  for (const id of ["temperature", "max-tokens", "top-p", "top-k", "seed", "system"]) remember(id, localStorage);
  remember("key", sessionStorage);
  $("probabilities").checked = isSet("probabilities");
  $("probabilities").addEventListener("change", () => {
    if ($("probabilities").checked) localStorage.setItem("luban.probabilities", "on");
    else localStorage.removeItem("luban.probabilities");
  });
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
  window.addEventListener("focus", () => {
    if (state.model && !state.abort) connect(); // adapters may have come and gone
  });

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
