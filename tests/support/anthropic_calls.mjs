// Calls the server at the given URL with Anthropic's own client for Node.js, and prints the answers.
// Run as: node anthropic_calls.mjs FOLDER_WITH_NODE_MODULES URL JSON_OF_TOOLS
import { createRequire } from "node:module";

const [folder, url, tools] = process.argv.slice(2);
const { default: Anthropic } = createRequire(`${folder}/package.json`)("@anthropic-ai/sdk");
const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
// "temperature" is not in its types any more, and is sent all the same.
const asked = { model: "tiny", max_tokens: 12, temperature: 0, messages: [{ role: "user", content: "Hello" }] };
const calls = { ...asked, model: "caller", max_tokens: 2000, temperature: 1, tools: JSON.parse(tools) };
const problem = await client.messages.create({ ...asked, model: "none" }).catch((error) => error);
console.log(
  JSON.stringify({
    whole: await client.messages.create(asked),
    streamed: await client.messages.stream(asked).finalMessage(),
    counted: await client.messages.countTokens({ model: asked.model, messages: asked.messages }),
    called: await client.messages.stream(calls).finalMessage(),
    problem: { name: problem.constructor.name, status: problem.status, type: problem.error.error.type, id: problem.requestID },
  }),
);
