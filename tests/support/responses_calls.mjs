// Runs where the npm package `openai` is: calls the server at the given URL, and prints what came.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const request = { model: "tiny", input: "Hello", max_output_tokens: 8, temperature: 0 };
const whole = await client.responses.create(request);
let joined = "";
const types = [];
for await (const event of await client.responses.create({ ...request, stream: true })) {
  types.push(event.type);
  if (event.type === "response.output_text.delta") joined += event.delta;
}
const helper = client.responses.stream(request);
const snapshots = [];
helper.on("response.output_text.delta", (event) => snapshots.push(event.snapshot));
const final = await helper.finalResponse();
const next = await client.responses.create({ ...request, input: "More", previous_response_id: whole.id });
let refused;
try {
  await client.responses.create({ ...request, tools: [{ type: "web_search" }] });
} catch (error) {
  refused = { status: error.status, message: error.message };
}
console.log(
  JSON.stringify({
    whole: whole.output_text,
    joined,
    types,
    snapshot: snapshots.at(-1),
    final: final.output_text,
    next: next.usage.input_tokens - whole.usage.input_tokens,
    refused,
  }),
);
