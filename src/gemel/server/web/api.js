// The server, as the page uses it: a streamed chat completion and the live figures. The page is an OpenAI client like any other.

/** The request body for what was said so far. `partial` is an answer to be continued, or null. */
export function chatBody(settings, messages, partial) {
  const turns = messages.map(({ role, text }) => ({ role, content: text }));
  if (settings.system.trim()) turns.unshift({ role: "system", content: settings.system });
  if (partial !== null) turns.push({ role: "assistant", content: partial });
  const body = { messages: turns, stream: true, stream_options: { include_usage: true } };
  for (const [name, value] of Object.entries(settings)) if (name !== "system" && value !== null) body[name] = value;
  if (partial !== null) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  return body;
}

/** Yields {text}, {finish} and {usage} as they come. Throws an Error with the server's own words. */
export async function* complete(body, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error(await refusal(response));
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices[0];
    if (choice?.delta.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (chunk.usage) yield { usage: chunk.usage };
  }
  throw new Error("The connection ended before the answer did.");
}

async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

/** The data of each server-sent event; comments are dropped. */
async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (pending + value).split("\n\n");
      pending = events.pop();
      for (const event of events) if (event.startsWith("data: ")) yield event.slice("data: ".length);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The live figures, or null when the server cannot be reached. */
export async function fetchStats() {
  try {
    const response = await fetch("/stats");
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}
