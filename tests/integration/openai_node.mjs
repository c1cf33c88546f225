// What a user of openai-node writes: prints {"text", "finish"} of one chat, streamed or not.
//
//     node openai_node.mjs BASE_URL CONTENT stream|whole
import OpenAI from "openai";

const [baseURL, content, mode] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const body = { model: "tiny", temperature: 0, messages: [{ role: "user", content }] };
let text = "";
let finish = null;
if (mode === "stream") {
  for await (const chunk of await client.chat.completions.create({ ...body, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
    finish = chunk.choices[0]?.finish_reason ?? finish;
  }
} else {
  const [choice] = (await client.chat.completions.create(body)).choices;
  ({ message: { content: text }, finish_reason: finish } = choice);
}
console.log(JSON.stringify({ text, finish }));
